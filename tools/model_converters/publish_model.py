"""Make a checkpoint fit to publish: weights only, with a hash in the name.

Optimizer, schedule, averaged weights and logs are left out. Kept are the weights, the config, the
classes, and how long they were trained. (The scripts of the same name in MMDetection and
MMPretrain cannot read a checkpoint of the Runner with torch >= 2.6.)

Example:
    python tools/model_converters/publish_model.py work_dirs/…/epoch_12.pth maskrcnn_biformer_s.pth
"""

import argparse
import hashlib
import io
from pathlib import Path

import torch

from mmbiformer.commands.faults import run_command
from mmbiformer.errors import UserError
from mmbiformer.files import write_whole
from mmbiformer.weights.read import read_checkpoint

KEPT = ('cfg', 'class_folders', 'dataset_meta', 'epoch', 'iter', 'mmengine_version')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', type=Path, metavar='SRC', help='checkpoint of a training')
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
    if args.dst.suffix != '.pth':
        raise UserError(f'{args.dst}: give DST a name in .pth')
    if not args.src.is_file():
        raise UserError(f'{args.src}: there is no such file')
    checkpoint = read_checkpoint(args.src)
    if not isinstance(checkpoint, dict) or not {'meta', 'state_dict'} <= checkpoint.keys():
        raise UserError(
            f'{args.src} is not a checkpoint of a training; for other files use '
            'tools/convert_checkpoint.py'
        )
    weights = averaged(checkpoint, args.src) if args.ema else checkpoint['state_dict']
    meta = {key: value for key, value in checkpoint['meta'].items() if key in KEPT}
    file = io.BytesIO()
    torch.save(dict(meta=meta, state_dict=weights), file)
    content = file.getvalue()
    digest = hashlib.sha256(content).hexdigest()[:8]
    path = args.dst.with_name(f'{args.dst.stem}-{digest}.pth')
    write_whole(path, content)
    before, after = (each.stat().st_size / 2**20 for each in (args.src, path))
    print(f'wrote {path}: {len(weights)} tensors, {after:.1f} MiB of {before:.1f}')


def averaged(checkpoint: dict, path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint under the names of the model."""
    if 'ema_state_dict' not in checkpoint:
        raise UserError(f'--ema: {path} has no averaged weights; it was trained without EMA')
    if not checkpoint.get('ema_at_side'):
        raise UserError(
            f"--ema: MMEngine's EMAHook has written the averaged weights in {path} as the weights "
            'themselves; leave out --ema'
        )
    return {
        name.removeprefix('module.'): value
        for name, value in checkpoint['ema_state_dict'].items()
        if name.startswith('module.')
    }


if __name__ == '__main__':
    run_command(main)
