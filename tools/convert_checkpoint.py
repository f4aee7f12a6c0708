"""Convert a checkpoint: the authors' names to this project's, torch.save to safetensors or back.

Configs and commands take any of these as they are; convert one to publish or inspect it. Only the
weights are written. A name that ends in .safetensors asks for that format.

Examples:
    python tools/convert_checkpoint.py biformer_small_best.pth biformer_s_in1k.pth
    python tools/convert_checkpoint.py work_dirs/mine/epoch_12.pth mine.safetensors
"""

import argparse
import os
from pathlib import Path

import safetensors.torch
import torch

from mmbiformer.checkpoint import (
    convert_official_state_dict,
    is_official,
    load_whole_model,
    register_safe_loader,
)
from mmbiformer.engine.checks import CommandError, check_file, check_writable
from mmbiformer.engine.command_line import run_command
from mmbiformer.safe_load import safe_load


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', type=Path, metavar='SRC', help="the authors' file, or one of ours")
    parser.add_argument('dst', type=Path, metavar='DST', help='file to write')
    return parser.parse_args()


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file, under this project's names."""
    checkpoint = safe_load(path)
    if not isinstance(checkpoint, dict) or is_official(checkpoint):
        return convert_official_state_dict(checkpoint)
    checkpoint = load_whole_model(str(path))  # weights under `model` it puts under `state_dict`
    state_dict = checkpoint.get('state_dict', checkpoint)
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CommandError(f'{path} holds names of weights but no tensors; give another SRC')
    return tensors


def main() -> None:
    """Read, rename, write."""
    args = parse_args()
    if args.dst.exists():
        raise CommandError(f'{args.dst} exists already; remove it or choose another name')
    check_file(str(args.src), 'SRC')
    check_writable(str(args.dst.parent), 'DST')
    register_safe_loader()
    state_dict = load_weights(args.src)
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: what is interrupted leaves no half a file.
    partial = args.dst.with_name(args.dst.name + '.partial')
    meta = dict(converted_from=args.src.name)
    if args.dst.suffix == '.safetensors':
        # It refuses tensors that share memory, and such as are not contiguous.
        tensors = {name: value.clone().contiguous() for name, value in state_dict.items()}
        safetensors.torch.save_file(tensors, partial, metadata=dict(meta, format='pt'))
    else:
        torch.save(dict(meta=meta, state_dict=state_dict), partial)
    os.replace(partial, args.dst)
    print(f'wrote {len(state_dict)} tensors to {args.dst}')


if __name__ == '__main__':
    run_command(main)
