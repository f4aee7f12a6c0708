"""Shared by the export commands: options, and the way from a config to a checked file."""

import argparse
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import nn
from torch.export import ExportedProgram

from ..errors import UserError
from ..export.graph import Exportable, trace
from ..export.verify import Runner, check
from ..export.whole import WholeModel, dataset_of_test, describe, resizing_steps, trace_whole
from ..files import PARTIAL
from ..models.base import Backbone
from ..weights.fit import check_fit, load_whole_model
from .options import add_config_options, image_size, read_config
from .runner import build_model

DIVISOR = 32
"""Detectors and segmentors see images whose sides are multiples of so many pixels."""
ODD_SIZE = 203, 321
"""Height and width in pixels at which a file for any size is checked."""


def run_export(
    description: str,
    suffix: str,
    needs: tuple[str, ...],
    note: str,
    write: Callable[[ExportedProgram, Path, Exportable], None],
    load: Callable[[Path], Runner],
    whole: bool = False,
) -> None:
    """Run an export command: build the model, trace, write, check, rename.

    Args:
        description: What the command does.
        suffix: Suffix of its files.
        needs: Packages that it needs.
        note: What to tell the user about the format.
        write: Writes a graph to a file.
        load: Loads such a file.
        whole: Whether its files may hold normalization and post-processing.

    Raises:
        UserError: If a package is not installed, an option does not fit, the checkpoint does not
            fit the model, or the file differs from PyTorch.
    """
    args = _parse_args(description, suffix, whole)
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'{" and ".join(missing)} not installed; install this package with its extra '
            "'export': pip install -e '.[export]'"
        )
    if args.out.suffix != suffix:
        raise UserError(f'--out {args.out}: the name must end in {suffix}')
    if args.out.exists():
        raise UserError(f'{args.out} exists already; remove it or choose another name')
    cfg = read_config(args)
    model, classes = _build(cfg, args.checkpoint)
    whole = whole and not args.backbone and not args.normalized
    if whole:
        size = _large_enough(_canvas(cfg, args.shape), model.backbone)
        net = WholeModel(model, _preprocessor(cfg), size)
        net.metadata['mmbiformer'] = describe(net, cfg, classes)
    else:
        part = model.backbone if args.backbone else _check_classifier(model, cfg, suffix)
        net = Exportable(part, any_size=args.shape is None)
        size = _image_size(cfg, args.shape, net)
    if args.checkpoint is None:
        print('no CHECKPOINT is given: the weights are random')

    # The file gets its name only after the check. Its folder has the same name each time, so that
    # the next export replaces what a killed one left.
    folder = args.out.with_name(f'.{args.out.name}{PARTIAL}')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        partial = folder / args.out.name
        print('1/3 tracing the graph', flush=True)
        program = trace_whole(net) if whole else trace(net, size)
        print(f'2/3 writing the {suffix} file, which takes minutes', flush=True)
        write(program, partial, net)
        print('3/3 running it beside PyTorch', flush=True)
        result = check(net, load(partial), size)
        os.replace(partial, args.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    print(f'wrote {args.out}: {args.out.stat().st_size / 2**20:.1f} MiB, {note}')
    if whole:
        most = '' if net.task == 'classification' else 'at most '
        print(f'  input: images, uint8, RGB, (batch, height, width, 3), {most}{size[0]}x{size[1]}')
    else:
        sides = 'height, width' if net.any_size else f'{size[0]}, {size[1]}'
        shape = f'(batch, {net.backbone.in_channels}, {sides})'
        print(f'  input: images {shape}, float32, normalized: {_normalization(cfg)}')
    print(f'  outputs: {", ".join(net.output_names)}')
    print(f'  {result}')


def _parse_args(description: str, suffix: str, whole: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    add_config_options(parser)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        metavar='CHECKPOINT',
        help='checkpoint of the whole model (default: random weights)',
    )
    parser.add_argument(
        '--out', type=Path, required=True, metavar=f'FILE{suffix}', help='file to write'
    )
    parser.add_argument(
        '--backbone',
        action='store_true',
        help="export the backbone's feature maps, for images of any size or of --shape",
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='height and width of the images, or one number for both (default: that of the test '
        'pipeline, with --backbone any)',
    )
    if whole:
        parser.add_argument(
            '--normalized',
            action='store_true',
            help='for classifiers: take float32 images (batch, 3, height, width) that are '
            'normalized already',
        )
    return parser.parse_args()


def _build(cfg: Config, checkpoint: str | None) -> tuple[nn.Module, Sequence[str]]:
    """Build the model with its weights; give the names of its classes, too.

    Args:
        cfg: The whole config; changed in place.
        checkpoint: Path or URL of the whole model's weights; None for random ones.

    Raises:
        UserError: If the backbone is another library's.
        CheckpointError: If the checkpoint does not fit the model.
    """
    model = build_model(cfg)
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, Backbone):
        raise UserError(
            f'{cfg.filename}: only backbones of mmbiformer are exported, and this one is of type '
            f'{type(backbone).__name__}'
        )
    names: Sequence[str] = ()
    if checkpoint is not None:
        loaded = load_whole_model(checkpoint)
        check_fit(model, loaded, checkpoint)
        weights = loaded['state_dict']
        names = (loaded.get('meta', {}).get('dataset_meta') or {}).get('classes', ())
        # check_fit has found all that the model needs; a file may hold more.
        model.load_state_dict(
            {name.removeprefix('module.'): weights[name] for name in weights}, strict=False
        )
    return model, names or _class_names(dataset_of_test(cfg))


def _class_names(dataset: Mapping[str, Any]) -> Sequence[str]:
    """The names of classes that a data set's config gives, or its class; none for a wrapper."""
    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(None) as registry:  # get() ignores the scope
            kind = registry.get(kind)
    known = dataset.get('metainfo'), getattr(kind, 'METAINFO', None)
    return next((each['classes'] for each in known if each and 'classes' in each), ())


def _check_classifier(model: nn.Module, cfg: Config, suffix: str) -> nn.Module:
    """The model, or UserError if it is no classifier."""
    if cfg.get('default_scope') != 'mmpretrain':
        raise UserError(
            f'{cfg.filename}: only classifiers are exported whole as {suffix} or with --normalized,'
            f' and this model is of type {type(model).__name__}; --backbone exports the feature '
            'maps'
        )
    return model


def _canvas(cfg: Config, shape: list[int] | None) -> tuple[int, int]:
    """Height and width of what a whole model sees, as asked for or as the test pipeline says.

    Those of detectors and segmentors are multiples of the divisor that the hosts pad to.
    """
    if cfg.get('default_scope') == 'mmpretrain':
        return image_size(cfg, shape)
    scales = [step['scale'] for step in resizing_steps(cfg) if step['type'] == 'Resize']
    if shape is None and scales and cfg.get('default_scope') == 'mmdet':
        shape = [*reversed(scales[0])]
    height, width = (-(-side // DIVISOR) * DIVISOR for side in image_size(cfg, shape))
    return height, width


def _image_size(cfg: Config, shape: list[int] | None, net: Exportable) -> tuple[int, int]:
    """Height and width as asked for, or those of the check where any size is exported."""
    least = net.backbone.min_size
    if shape is None and net.any_size:
        return max(ODD_SIZE[0], least[0]), max(ODD_SIZE[1], least[1])
    return _large_enough(image_size(cfg, shape), net.backbone)


def _large_enough(size: tuple[int, int], backbone: Backbone) -> tuple[int, int]:
    """The size, or UserError."""
    least = backbone.min_size
    if size[0] < least[0] or size[1] < least[1]:
        raise UserError(
            f'--shape {size[0]} {size[1]}: this model needs images of at least '
            f'{least[0]}x{least[1]} pixels'
        )
    return size


def _preprocessor(cfg: Config) -> dict[str, Any]:
    """The settings of the data preprocessor."""
    return {
        **(cfg.get('data_preprocessor') or {}),
        **(cfg.model.get('data_preprocessor') or {}),
    }


def _normalization(cfg: Config) -> str:
    """Describe the normalization of the data preprocessor."""
    settings = _preprocessor(cfg)
    order = 'RGB' if settings.get('to_rgb') or settings.get('bgr_to_rgb') else 'BGR'
    return f'{order}, mean {settings.get("mean")}, std {settings.get("std")}'
