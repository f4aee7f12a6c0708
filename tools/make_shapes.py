"""Make the synthetic shapes data set: for detection, segmentation or classification.

Examples:
    python tools/make_shapes.py --out data/shapes
    python tools/make_shapes.py --format ade20k --out data/shapes_ade20k --train 200 --seed 1
    python tools/make_shapes.py --format imagenet --out data/shapes_imagenet --size 96 96
"""

import argparse
import time
from dataclasses import fields, replace
from pathlib import Path

import cv2

from mmbiformer.commands.faults import run_command
from mmbiformer.errors import UserError
from mmbiformer.files import write_whole
from mmbiformer.shapes import FORMATS, ShapesSpec, format_summary, make_shapes, summarise
from mmbiformer.shapes.images import encode_image
from mmbiformer.shapes.preview import preview

PREVIEW_SCENES = 12


def _add_spec_options(parser: argparse.ArgumentParser) -> None:
    """One option for every field of the spec; pairs take two values."""
    group = parser.add_argument_group('images')
    for item in fields(ShapesSpec):
        pair = isinstance(item.default, tuple)
        defaults = {}
        for name, layout in FORMATS.items():
            value = getattr(layout.spec, item.name)
            text = ' '.join(map(str, value)) if pair else str(value)
            defaults.setdefault(text, []).append(name)
        default = '; '.join(
            text if len(defaults) == 1 else f'{text} for {", ".join(names)}'
            for text, names in defaults.items()
        )
        names = ('WIDTH', 'HEIGHT') if item.name == 'size' else ('LOW', 'HIGH')
        group.add_argument(
            f'--{item.name.replace("_", "-")}',
            type=type(item.default[0]) if pair else type(item.default),
            nargs=2 if pair else None,
            metavar=names if pair else 'X',
            help=f'{item.metadata["help"]} (default: {default})',
        )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', required=True, help='folder of the data set')
    parser.add_argument(
        '--format',
        choices=list(FORMATS),
        default='coco',
        help='COCO instances, ADE20K-style semantic masks, ImageNet-style class folders '
        '(default: coco)',
    )
    parser.add_argument('--train', type=int, default=400, help='training images (default: 400)')
    parser.add_argument('--val', type=int, default=100, help='validation images (default: 100)')
    parser.add_argument('--seed', type=int, default=0, help='seed of all images (default: 0)')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace a set made with other parameters'
    )
    parser.add_argument('--preview', metavar='FILE.png', help='also draw a contact sheet')
    _add_spec_options(parser)
    return parser.parse_args()


def main() -> None:
    """Make the set, or say that it is there already, and describe it."""
    args = parse_args()
    if args.preview and not cv2.haveImageWriter(f'x{Path(args.preview).suffix}'):
        raise UserError(f'--preview {args.preview}: the name must end like a picture, e.g. in .png')
    layout = FORMATS[args.format]
    given = {item.name: getattr(args, item.name) for item in fields(ShapesSpec)}
    spec = replace(layout.spec, **{key: x for key, x in given.items() if x is not None})
    start = time.perf_counter()
    made = make_shapes(
        args.out, args.train, args.val, args.seed, spec, args.overwrite, format=args.format
    )
    if made:
        print(f'made {args.out} in {time.perf_counter() - start:.1f} s')
    else:
        print(f'{args.out} is complete already, nothing to do')
    if args.preview:
        scenes = layout.scenes(spec, args.seed, 'train', PREVIEW_SCENES)
        write_whole(args.preview, encode_image(Path(args.preview), preview(list(scenes))))
        print(f'drew {args.preview}')
    print(format_summary(summarise(args.out)))


if __name__ == '__main__':
    run_command(main)
