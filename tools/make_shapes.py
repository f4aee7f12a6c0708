"""Make the synthetic shapes data set in COCO instances format.

Example:
    python tools/make_shapes.py --out data/shapes --train 400 --val 100 --seed 0
"""

import argparse
import sys
import time
from dataclasses import fields

from mmbiformer.datasets.shapes import (
    ShapesSpec,
    format_summary,
    make_shapes,
    summarise,
    write_preview,
)


def _add_spec_options(parser: argparse.ArgumentParser) -> None:
    """One option for every field of the spec, pairs taking two values."""
    for item in fields(ShapesSpec):
        pair = isinstance(item.default, tuple)
        parser.add_argument(
            f'--{item.name.replace("_", "-")}',
            type=type(item.default[0]) if pair else type(item.default),
            nargs=2 if pair else None,
            default=item.default,
            metavar=(('WIDTH', 'HEIGHT') if item.name == 'size' else ('LOW', 'HIGH'))
            if pair
            else 'X',
            help=f'{item.metadata["help"]} (default: %(default)s)',
        )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', required=True, help='folder of the data set')
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
    try:
        spec = ShapesSpec(**{item.name: getattr(args, item.name) for item in fields(ShapesSpec)})
        start = time.perf_counter()
        made = make_shapes(args.out, args.train, args.val, args.seed, spec, args.overwrite)
    except (ValueError, FileExistsError) as error:
        sys.exit(f'error: {error}')
    if made:
        print(f'made {args.out} in {time.perf_counter() - start:.1f} s')
    else:
        print(f'{args.out} is complete already, nothing to do')
    if args.preview:
        write_preview(args.preview, spec, args.seed)
        print(f'drew {args.preview}')
    print(format_summary(summarise(args.out)))


if __name__ == '__main__':
    main()
