"""Convert a checkpoint: the authors' names to this project's, torch.save to safetensors or back.

Configs and commands take any of these as they are; convert one to inspect it or to use it
elsewhere. Only the weights are written. A name that ends in .safetensors asks for that format.

Examples:
    python tools/convert_checkpoint.py biformer_small_best.pth biformer_s_in1k.pth
    python tools/convert_checkpoint.py work_dirs/mine/epoch_12.pth mine.safetensors
"""

import argparse
import io
from pathlib import Path

import safetensors.torch
import torch

from mmbiformer.commands.faults import run_command
from mmbiformer.errors import UserError
from mmbiformer.files import write_whole
from mmbiformer.weights.fit import load_whole_model


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', type=Path, metavar='SRC', help="the authors' file, or one of ours")
    parser.add_argument('dst', type=Path, metavar='DST', help='file to write')
    return parser.parse_args()


def main() -> None:
    """Read, rename, write."""
    args = parse_args()
    if args.dst.exists():
        raise UserError(f'{args.dst} exists already; remove it or choose another name')
    if args.dst.suffix not in ('.pth', '.safetensors'):
        raise UserError(f'{args.dst}: give DST a name in .pth or .safetensors')
    weights = load_whole_model(args.src)['state_dict']
    weights = {name: each for name, each in weights.items() if isinstance(each, torch.Tensor)}
    meta = dict(converted_from=args.src.name)
    if args.dst.suffix == '.safetensors':
        # safetensors refuses tensors that share memory or are not contiguous.
        weights = {
            name: each.clone(memory_format=torch.contiguous_format)
            for name, each in weights.items()
        }
        content = safetensors.torch.save(weights, dict(meta, format='pt'))
    else:
        file = io.BytesIO()
        torch.save(dict(meta=meta, state_dict=weights), file)
        content = file.getvalue()
    write_whole(args.dst, content)
    print(f'wrote {len(weights)} tensors to {args.dst}')


if __name__ == '__main__':
    run_command(main)
