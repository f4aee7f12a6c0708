"""Convert a checkpoint: the authors' names to this project's, torch.save to safetensors or back.

Configs and commands take any of these as they are; convert one to publish or inspect it. Only the
weights are written. A name that ends in .safetensors asks for that format.

Examples:
    python tools/convert_checkpoint.py biformer_small_best.pth biformer_s_in1k.pth
    python tools/convert_checkpoint.py work_dirs/mine/epoch_12.pth mine.safetensors
"""

import argparse
import io
import os
from collections import OrderedDict
from pathlib import Path

import safetensors.torch
import torch

from mmbiformer.checkpoint import check_weights, load_whole_model, register_safe_loader
from mmbiformer.engine.checks import CommandError, check_file, check_writable
from mmbiformer.engine.command_line import run_command
from mmbiformer.engine.files import write_whole
from mmbiformer.safe_load import DIGEST_KEY, VERSION_KEY, safetensors_digest

SLACK = 2**24  # bytes that a file may grow beyond twice its size


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', metavar='SRC', help="the authors' file, or one of ours")
    parser.add_argument('dst', metavar='DST', help='file to write')
    return parser.parse_args()


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file, under this project's names."""
    checkpoint = load_whole_model(str(path))  # weights under `model` it puts under `state_dict`
    state_dict = checkpoint.get('state_dict', checkpoint)
    weights = OrderedDict(
        (name, value) for name, value in state_dict.items() if isinstance(value, torch.Tensor)
    )
    check_weights(weights, path)
    weights._metadata = getattr(state_dict, '_metadata', OrderedDict())
    return weights


def as_safetensors(state_dict: dict[str, torch.Tensor], size: int, **metadata: str) -> bytes:
    """The content of a safetensors file; ``size`` is that of the file that was read."""
    for name, value in state_dict.items():
        if not has_safetensors(value.dtype):
            raise CommandError(
                f'{name[:80]!r} is of {value.dtype}, which safetensors does not have; give DST a '
                'name in .pth'
            )
    # It has no tensors that share memory: each is written out.
    total = sum(value.nbytes for value in state_dict.values())
    if total > 2 * size + SLACK:
        raise CommandError(
            f'SRC has {size / 1e6:.0f} MB, but {total / 1e6:.0f} MB as safetensors, where tensors '
            'cannot share their memory; give DST a name in .pth'
        )
    tensors = {name: value.clone().contiguous() for name, value in state_dict.items()}
    try:
        metadata[DIGEST_KEY] = safetensors_digest(safetensors.torch.save(tensors, metadata))
        return safetensors.torch.save(tensors, metadata)
    except Exception as error:  # a name of SRC that is no Unicode, for one
        raise CommandError(
            f'safetensors cannot hold these weights: {type(error).__name__}: {str(error)[:200]}; '
            'give DST a name in .pth'
        ) from error


def has_safetensors(dtype: torch.dtype) -> bool:
    """Whether safetensors writes and reads a dtype: it only says so by trying."""
    try:
        safetensors.torch.load(safetensors.torch.save(dict(x=torch.empty(1, dtype=dtype))))
    except Exception:
        return False
    return True


def as_pth(state_dict: dict[str, torch.Tensor], **meta: str) -> bytes:
    """The content of a file of torch.save."""
    file = io.BytesIO()
    torch.save(dict(meta=meta, state_dict=state_dict), file)
    return file.getvalue()


def main() -> None:
    """Read, rename, write."""
    args = parse_args()
    if args.dst.endswith(os.sep) or os.path.isdir(args.dst):  # which Path would not show
        raise CommandError(f'{args.dst} is a folder; give FOLDER/NAME.pth')
    args.dst = Path(args.dst)
    if os.path.lexists(args.dst):
        raise CommandError(f'{args.dst} exists already; remove it or choose another name')
    if args.dst.suffix not in ('.pth', '.pt', '.safetensors'):
        raise CommandError(f'{args.dst}: give DST a name in .pth or .safetensors')
    check_file(args.src, 'SRC', urls=False)
    args.src = Path(args.src).expanduser()
    check_writable(str(args.dst.parent), 'DST')
    register_safe_loader()
    state_dict = load_weights(args.src)
    meta = dict(converted_from=args.src.name)
    if args.dst.suffix == '.safetensors':
        for name, entry in state_dict._metadata.items():
            if entry.get('version', 1) > 1:  # which is what torch takes for granted
                meta[VERSION_KEY + name] = str(entry['version'])
        content = as_safetensors(state_dict, args.src.stat().st_size, **meta, format='pt')
    else:
        content = as_pth(state_dict, **meta)
    write_whole(args.dst, content)
    print(f'wrote {len(state_dict)} tensors to {args.dst}')


if __name__ == '__main__':
    run_command(main)
