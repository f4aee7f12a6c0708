"""Convert one of the authors' BiFormer checkpoints to this project's names.

Configs and commands take the authors' files as they are; convert one to publish or inspect it.

Example:
    python tools/convert_checkpoint.py biformer_small_best.pth biformer_s_in1k.pth
"""

import argparse
import os
from pathlib import Path

import torch

from mmbiformer.checkpoint import convert_official_state_dict
from mmbiformer.engine.command_line import CommandError, check_file, run_command
from mmbiformer.safe_load import safe_load


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', type=Path, metavar='SRC', help="the authors' file")
    parser.add_argument('dst', type=Path, metavar='DST', help='file to write')
    return parser.parse_args()


def main() -> None:
    """Read, rename, write."""
    args = parse_args()
    if args.dst.exists():
        raise CommandError(f'{args.dst} exists already; remove it or choose another name')
    check_file(str(args.src), 'SRC')
    state_dict = convert_official_state_dict(safe_load(args.src))
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: what is interrupted leaves no half a file.
    partial = args.dst.with_name(args.dst.name + '.partial')
    torch.save(dict(meta=dict(converted_from=args.src.name), state_dict=state_dict), partial)
    os.replace(partial, args.dst)
    print(f'wrote {len(state_dict)} tensors to {args.dst}')


if __name__ == '__main__':
    run_command(main)
