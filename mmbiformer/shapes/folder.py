"""The folder of a shapes data set.

A set is made once and completely, and replaces nothing that this generator has not made.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import track
from torch.utils.data import DataLoader

from ..errors import UserError
from .formats import FORMATS
from .scenes import Scene, Scenes
from .spec import GENERATOR, SPLITS, VERSION, ShapesSpec

META = 'meta.json'
PARTIAL_META = 'meta.partial.json'
"""Name of the meta file until the set is complete."""

SCENES_PER_WORKER = 50
"""Fewer scenes than this do not pay for starting a process."""


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

    An incomplete set is made anew.

    Args:
        out: Folder of the data set.
        train: Number of training images. Defaults to 400.
        val: Number of validation images. Defaults to 100.
        seed: Seed of all images, >= 0. Defaults to 0.
        spec: What the images look like. Defaults to None, the format's own.
        overwrite: Replace a complete set made with other parameters. Defaults to False.
        progress: Show a progress bar. Defaults to True.
        format: ``'coco'``, ``'ade20k'`` or ``'imagenet'``, see :mod:`.formats`. Defaults to
            ``'coco'``.

    Returns:
        Whether the set was made; false if the very same set was there already.

    Raises:
        UserError: If a number of images or the seed is negative, the format is unknown, the folder
            was not made by this generator, or it holds a set made with other parameters and
            ``overwrite`` is false.
    """
    if format not in FORMATS:
        raise UserError(f'format={format!r} is unknown; choose one of {list(FORMATS)}')
    layout = FORMATS[format]
    out, spec = Path(out), spec or layout.spec
    wanted = _parameters(train, val, seed, spec, format)
    if not _needs_making(out, wanted, overwrite):
        return False
    # A spec that does not work is found here, before anything is removed.
    for split in SPLITS:
        layout.scenes(spec, seed, split, 1).draw(0)
    out.mkdir(parents=True, exist_ok=True)
    # There is one meta file at any time. It has its final name only while the set is complete, so
    # an interrupted run is recognised.
    if (out / META).exists():
        os.replace(out / META, out / PARTIAL_META)
    _clear(out)
    try:
        (out / PARTIAL_META).write_text(json.dumps(wanted, indent=2) + '\n', encoding='utf-8')
    except OSError:
        (out / PARTIAL_META).unlink(missing_ok=True)  # half a file would not be known as ours
        raise
    for split, count in (('train', train), ('val', val)):
        made = _drawn(layout.scenes(spec, seed, split, count))
        bar = track(made, f'{split} images', total=count, disable=not progress)
        layout.write(bar, out, split)
    os.replace(out / PARTIAL_META, out / META)
    return True


def _drawn(scenes: Scenes) -> Iterable[Scene]:
    """The scenes in their order; as many processes as PyTorch has threads draw many scenes."""
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
    """All that determines a data set, as JSON would give it back."""
    if min(train, val, seed) < 0:
        raise UserError(f'train={train}, val={val} and seed={seed} must not be negative')
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
    meta.setdefault('format', 'coco')  # the first version knew no other
    return meta if meta['format'] in FORMATS else None


def _has_all_files(out: Path, meta: dict) -> bool:
    """Whether all files of a complete set are still there."""
    is_whole = FORMATS[meta['format']].is_whole
    return all(is_whole(out, split, meta.get(split)) for split in SPLITS)


def _needs_making(out: Path, wanted: dict, overwrite: bool) -> bool:
    """Whether the set must be made; raises if the folder must not be touched.

    Args:
        out: Folder of the data set.
        wanted: Parameters of the set.
        overwrite: Whether a complete set of other parameters may be replaced.

    Raises:
        UserError: If the folder is not this generator's, or holds a complete set of other
            parameters and ``overwrite`` is false.
    """
    if not out.exists():
        return True
    if not out.is_dir():
        raise UserError(f'{out} is not a folder; choose another name')
    meta = _own_meta(out / META)
    if meta is not None and _has_all_files(out, meta):
        if meta == wanted:
            return False
        if not overwrite:
            raise UserError(
                f'{out} holds a shapes data set made with other parameters or another version; '
                'choose another folder, or overwrite it (--overwrite)'
            )
    elif meta is None and _own_meta(out / PARTIAL_META) is None and any(out.iterdir()):
        raise UserError(
            f'{out} is not empty and was not made by this generator: it stays as it is; choose '
            'another folder'
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
