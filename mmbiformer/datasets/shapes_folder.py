"""The folder of a shapes data set: made once, never half, and never over something else."""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import track
from torch.utils.data import DataLoader

from .shapes import GENERATOR, SPLITS, VERSION, Scene, Scenes, ShapesSpec
from .shapes_formats import FORMATS

META = 'meta.json'
PARTIAL_META = 'meta.partial.json'
"""Name of the meta file until the set is complete."""

SCENES_PER_WORKER = 50
"""Scenes that it pays to start a process for."""


def make_shapes(
    out: str | os.PathLike,
    train: int = 400,
    val: int = 100,
    seed: int = 0,
    spec: ShapesSpec | None = None,
    overwrite: bool = False,
    progress: bool = True,
    format: str = 'coco',
) -> bool:
    """Make a data set of shapes, unless it is there already.

    A set that was left incomplete is made anew.

    Args:
        out: Folder of the data set.
        train: Number of training images. Defaults to 400.
        val: Number of validation images. Defaults to 100.
        seed: Seed of all images, >= 0. Defaults to 0.
        spec: What the images look like. Defaults to None, the format's own.
        overwrite: Replace a complete set made with other parameters. Defaults to False.
        progress: Show a progress bar. Defaults to True.
        format: ``'coco'``, ``'ade20k'`` or ``'imagenet'``, see ``shapes_formats.py``. Defaults to
            ``'coco'``.

    Returns:
        Whether the set was made; false if the very same set was there already.

    Raises:
        ValueError: A number of images or the seed is negative, or the format unknown.
        FileExistsError: The folder was not made by this generator, or holds a set made with other
            parameters and ``overwrite`` is false.
    """
    if format not in FORMATS:
        raise ValueError(f'format={format!r} is unknown; choose one of {list(FORMATS)}')
    layout = FORMATS[format]
    out, spec = Path(out), spec or layout.spec
    wanted = _parameters(train, val, seed, spec, format)
    if not _needs_making(out, wanted, overwrite):
        return False
    # Before anything is removed, what a spec can be wrong about comes to light.
    for split in SPLITS:
        layout.scenes(spec, seed, split, 1).draw(0)
    out.mkdir(parents=True, exist_ok=True)
    # There is one meta file at any time, and it is the final one only while the set is complete:
    # that is how an interrupted run is recognised.
    if (out / META).exists():
        os.replace(out / META, out / PARTIAL_META)
    _clear(out)
    try:
        (out / PARTIAL_META).write_text(json.dumps(wanted, indent=2) + '\n', encoding='utf-8')
    except OSError:
        (out / PARTIAL_META).unlink(missing_ok=True)  # half of it would not be known as ours
        raise
    for split, count in (('train', train), ('val', val)):
        made = _drawn(layout.scenes(spec, seed, split, count))
        bar = track(made, f'{split} images', total=count, disable=not progress)
        layout.write(bar, out, split)
    os.replace(out / PARTIAL_META, out / META)
    return True


def _drawn(scenes: Scenes) -> Iterable[Scene]:
    """The scenes in their order; many are drawn by as many processes as PyTorch has threads."""
    workers = min(torch.get_num_threads(), len(scenes) // SCENES_PER_WORKER)
    return DataLoader(scenes, batch_size=None, num_workers=workers, collate_fn=_as_is)


def _as_is(scene: Scene) -> Scene:
    return scene


def summarise(out: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Numbers that describe a data set.

    Args:
        out: Folder of a complete data set.

    Returns:
        For each split a table row: numbers by name.
    """
    out = Path(out)
    layout = FORMATS[_own_meta(out / META)['format']]
    return {split: layout.summarise(out, split) for split in SPLITS}


def format_summary(summary: dict[str, dict[str, float]]) -> str:
    """The summary as a text table: one row per number, one column per split."""
    splits = list(summary)
    lines = [f'{"":26}' + ''.join(f'{split:>10}' for split in splits)]
    for name in summary[splits[0]]:
        lines.append(f'{name:26}' + ''.join(f'{summary[split][name]:>10}' for split in splits))
    return '\n'.join(lines)


def _parameters(train: int, val: int, seed: int, spec: ShapesSpec, format: str) -> dict:
    """All that determines a data set, as it reads back from JSON."""
    if min(train, val, seed) < 0:
        raise ValueError('train, val and seed must not be negative')
    counts = {'train': train, 'val': val}
    meta = {'generator': GENERATOR, 'version': VERSION, 'format': format, 'seed': seed, **counts}
    return json.loads(json.dumps(meta | {'spec': asdict(spec)}))


def _own_meta(path: Path) -> dict | None:
    """Content of a meta file of this generator, ``None`` for anything else."""
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    if not isinstance(meta, dict) or meta.get('generator') != GENERATOR:
        return None
    meta.setdefault('format', 'coco')  # of before there were others
    return meta if meta['format'] in FORMATS else None


def _has_all_files(out: Path, meta: dict) -> bool:
    """Whether the files that a complete set's meta file speaks of are still there."""
    is_whole = FORMATS[meta['format']].is_whole
    return all(is_whole(out, split, meta.get(split)) for split in SPLITS)


def _needs_making(out: Path, wanted: dict, overwrite: bool) -> bool:
    """Whether the set must be made; raises where a folder must not be touched.

    Args:
        out: Folder of the data set.
        wanted: Parameters of the set.
        overwrite: Whether a complete set of other parameters may be replaced.

    Raises:
        FileExistsError: The folder is not this generator's, or holds a complete set of other
            parameters and ``overwrite`` is false.
    """
    if not out.exists():
        return True
    if not out.is_dir():
        raise FileExistsError(f'{out} is not a folder')
    meta = _own_meta(out / META)
    if meta is not None and _has_all_files(out, meta):
        if meta == wanted:
            return False
        if not overwrite:
            raise FileExistsError(
                f'{out} holds a shapes data set made with other parameters or another version; '
                'choose another folder, or overwrite it (--overwrite)'
            )
    elif meta is None and _own_meta(out / PARTIAL_META) is None and any(out.iterdir()):
        raise FileExistsError(
            f'{out} is not empty and was not made by this generator: left as it is, '
            'choose another folder'
        )
    return True


def _clear(out: Path) -> None:
    """Remove what this generator made in a folder of its own, and nothing else."""
    meta = _own_meta(out / PARTIAL_META)
    if meta is None:
        return
    for name in FORMATS[meta['format']].folders:
        if (out / name).exists():
            shutil.rmtree(out / name)
