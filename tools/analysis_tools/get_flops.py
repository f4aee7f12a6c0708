"""Count the multiply-adds and parameters of a config's model, attention included.

Counted are products, for one image; see mmbiformer/commands/complexity.py. The heads of a two-stage
detector are counted for the proposals of random weights, at most those that the config keeps.

Examples:
    python tools/analysis_tools/get_flops.py configs/biformer_s_in1k.py
    python tools/analysis_tools/get_flops.py configs/maskrcnn_biformer_s_coco.py --shape 800 1280
"""

import argparse
import sys

from mmbiformer.commands.complexity import count_macs
from mmbiformer.commands.fake_data import fake_batch
from mmbiformer.commands.faults import run_command
from mmbiformer.commands.options import add_config_options, image_size, read_config
from mmbiformer.commands.runner import build_model


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_options(parser)
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='height and width of the image, or one number for both (default: 224 224 for '
        'classification, 800 1280 for detection, 512 512 for segmentation)',
    )
    return parser.parse_args()


def main() -> None:
    """Build, count, print."""
    args = parse_args()
    cfg = read_config(args)
    height, width = image_size(cfg, args.shape)
    print(f'{args.config}: running one image of {height}x{width} …', file=sys.stderr, flush=True)
    model = build_model(cfg)
    batch = fake_batch(cfg, 1, (height, width))
    data = model.data_preprocessor(batch)
    macs = count_macs(model, **data, mode='tensor')
    params = {
        name: sum(param.numel() for param in part.parameters())
        for name, part in model.named_children()
    }
    params['total'] = sum(param.numel() for param in model.parameters())
    padded = tuple(data['inputs'].shape[2:])
    note = '' if padded == (height, width) else f', padded to {padded[0]}x{padded[1]}'
    print(f'{args.config}: one image of {height}x{width}{note}')
    print(f'{"":18}{"multiply-adds":>22}{"parameters":>16}')
    names = [name for name in params if params[name] and name != 'total']
    for name in [*names, *(['other'] if 'other' in macs else []), 'total']:
        print(f'{name:18}{macs.get(name, 0):>22,}{params.get(name, 0):>16,}')


if __name__ == '__main__':
    run_command(main)
