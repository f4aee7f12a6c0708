"""Make a checkpoint fit to publish: weights only, with a hash in the name.

Optimizer, schedule, averaged weights and logs are left out. Kept are the weights and, of the rest,
what tells how to use them: config, classes, and how long they were trained. The file is read as
tensors and plain data only.

Example:
    python tools/model_converters/publish_model.py work_dirs/…/epoch_12.pth maskrcnn_biformer_s.pth
"""

import argparse
import hashlib
import io
from collections import OrderedDict
from pathlib import Path

import torch

from mmbiformer.checkpoint import check_weights, load_whole_model, register_safe_loader
from mmbiformer.engine.checks import CommandError, check_file, check_writable
from mmbiformer.engine.command_line import run_command
from mmbiformer.engine.files import write_whole
from mmbiformer.safe_load import safe_load

KEPT = ('cfg', 'class_folders', 'dataset_meta', 'epoch', 'iter', 'mmengine_version')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', metavar='SRC', help='checkpoint of a training')
    parser.add_argument(
        'dst', type=Path, metavar='DST', help='file to write; NAME.pth becomes NAME-HASH.pth'
    )
    parser.add_argument(
        '--ema', action='store_true', help='publish the averaged weights instead of the raw ones'
    )
    return parser.parse_args()


def main() -> None:
    """Read, strip, write, name."""
    args = parse_args()
    check_file(args.src, 'SRC', urls=False)
    args.src = Path(args.src).expanduser()
    if args.dst.is_dir():
        raise CommandError(f'{args.dst} is a folder; give DST as FOLDER/NAME.pth')
    if args.dst.suffix != '.pth':
        raise CommandError(f'{args.dst}: give DST a name in .pth')
    check_writable(str(args.dst.parent), 'DST')
    register_safe_loader()
    load_whole_model(str(args.src))
    checkpoint = safe_load(args.src)
    if not isinstance(checkpoint.get('state_dict'), dict):
        raise CommandError(
            f"{args.src} was not written by this project; for one of the authors' files use "
            'tools/convert_checkpoint.py'
        )
    state_dict = checkpoint['state_dict']
    if args.ema:
        state_dict = averaged(checkpoint, args.src)
    for name in [name for name in state_dict if not isinstance(state_dict[name], torch.Tensor)]:
        del state_dict[name]  # what stands for an object that was not read, for one
    check_weights(state_dict, args.src)
    meta = checkpoint.get('meta', {})
    if not isinstance(meta, dict):
        raise CommandError(
            f'{args.src}: its meta is a {type(meta).__name__} instead of a dictionary; give a '
            'checkpoint as training writes them'
        )
    meta = {key: value for key, value in meta.items() if key in KEPT}
    file = io.BytesIO()
    torch.save(dict(meta=meta, state_dict=state_dict), file)
    content = file.getvalue()
    digest = hashlib.sha256(content).hexdigest()[:8]
    path = args.dst.with_name(f'{args.dst.stem}-{digest}.pth')
    write_whole(path, content)
    before, after = (file.stat().st_size / 2**20 for file in (args.src, path))
    print(f'wrote {path}: {len(state_dict)} tensors, {after:.1f} MiB of {before:.1f}')


def averaged(checkpoint: dict, path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint under the names of the model."""
    if 'ema_state_dict' not in checkpoint:
        raise CommandError(f'--ema: {path} has no averaged weights; it was trained without EMA')
    if not checkpoint.get('ema_at_side'):
        raise CommandError(
            f"--ema: MMEngine's EMAHook has written the averaged weights in {path} as the weights "
            'themselves; leave out --ema'
        )
    averages = checkpoint['ema_state_dict']
    found = OrderedDict(
        (key.removeprefix('module.'), value)
        for key, value in (averages.items() if isinstance(averages, dict) else ())
        if isinstance(key, str) and key.startswith('module.')
    )
    found._metadata = getattr(checkpoint['state_dict'], '_metadata', OrderedDict())
    if shapes(found) != shapes(checkpoint['state_dict']):
        raise CommandError(
            f'--ema: the averaged weights in {path} are not those of its model; leave out --ema, '
            'or give a checkpoint as training writes them'
        )
    return found


def shapes(state_dict: dict) -> dict[str, tuple | None]:
    """The shapes of tensors by name."""
    return {
        name: value.shape if isinstance(value, torch.Tensor) else None
        for name, value in state_dict.items()
    }


if __name__ == '__main__':
    run_command(main)
