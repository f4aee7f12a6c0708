"""Make label maps for token labeling with a classifier of MMPretrain or timm.

One file an image, OUT/CLASS/NAME.pt for IMAGES/…/CLASS/NAME.JPEG: the scores of the best classes at
each place of the classifier's last map of the whole image. Files that are there already are kept.

Examples:
    python tools/make_token_labels.py data/imagenet/train data/imagenet_token_labels --timm \\
        dm_nfnet_f6 --size 576
    python tools/make_token_labels.py data/mine/train data/mine_labels --config mine.py \\
        --checkpoint work_dirs/mine/epoch_300.pth
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from mmengine.device import get_device
from mmengine.runner import load_checkpoint
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from mmbiformer.commands.faults import run_command
from mmbiformer.commands.options import image_size, read_config
from mmbiformer.commands.runner import build_model
from mmbiformer.errors import UserError
from mmbiformer.files import write_whole

EXACT_HALF = 2048  # up to here half floats hold all whole numbers

Scorer = Callable[[Tensor], Tensor]
"""Images (B, 3, S, S), RGB from 0 to 1, to scores (B, K, H, W)."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'images', type=Path, help='folder of the training images, one a class in it'
    )
    parser.add_argument('out', type=Path, help='folder of the label maps')
    parser.add_argument('--config', help='config of a classifier of MMPretrain')
    parser.add_argument('--timm', metavar='NAME', help='name of a classifier of timm')
    parser.add_argument(
        '--checkpoint', help="its weights (needed by --config; default of --timm: timm's own)"
    )
    parser.add_argument(
        '--size',
        type=int,
        help='pixels to which both sides of an image are resized; a stride of 32 makes 18x18 '
        'places of 576 (default: the usual size of the classifier)',
    )
    parser.add_argument('--topk', type=int, default=5, help='scores a place (default: 5)')
    parser.add_argument('--batch-size', type=int, default=32, help='images at once (default: 32)')
    parser.add_argument('--workers', type=int, default=2, help='loading processes (default: 2)')
    parser.add_argument('--device', default=get_device(), help='(default: a GPU if there is one)')
    parser.set_defaults(cfg_options=None)
    args = parser.parse_args()
    if (args.config is None) == (args.timm is None):
        parser.error('give one classifier, by --config or by --timm')
    if args.config is not None and args.checkpoint is None:
        parser.error('--config needs the weights of the classifier: --checkpoint FILE')
    return args


def mmpretrain_scorer(args: argparse.Namespace) -> tuple[Scorer, int]:
    """A classifier of MMPretrain and its usual image size.

    Raises:
        UserError: If it gives no map, or is no classifier of MMPretrain.
    """
    cfg = read_config(args)
    if cfg.get('default_scope') != 'mmpretrain':
        raise UserError(f'--config {args.config}: this is no classifier of MMPretrain')
    if 'init_cfg' in cfg.model.get('backbone', {}):
        cfg.model.backbone.init_cfg = None  # the checkpoint brings all weights
    model = build_model(cfg).eval().to(args.device)
    load_checkpoint(model, args.checkpoint, map_location='cpu')

    def head(tokens: Tensor) -> Tensor:
        feats = (tokens,)
        return model.head(model.neck(feats) if model.with_neck else feats)

    def scores(images: Tensor) -> Tensor:
        batch = [image.flip(0) for image in images * 255]  # BGR, as MMPretrain loads
        inputs = model.data_preprocessor(dict(inputs=batch))['inputs']
        return scores_by_place(model.extract_feat(inputs, stage='backbone')[-1], head)

    return scores, image_size(cfg, None)[0]


def timm_scorer(args: argparse.Namespace) -> tuple[Scorer, int]:
    """A classifier of timm and the size of its test images."""
    own = args.checkpoint is None
    model = timm.create_model(args.timm, pretrained=own, checkpoint_path=args.checkpoint or '')
    model = model.eval().to(args.device)
    data = timm.data.resolve_model_data_config(model, use_test_size=True)
    normalize = transforms.Normalize(data['mean'], data['std'])
    prefix = getattr(model, 'num_prefix_tokens', 0)

    def scores(images: Tensor) -> Tensor:
        x = model.forward_features(normalize(images))
        if x.ndim == 3:  # tokens in rows, after class tokens
            side = int((x.shape[1] - prefix) ** 0.5)
            tokens = x[:, prefix:].unflatten(1, (side, -1)).permute(0, 3, 1, 2)
            # Each place stands alone, in the class token's place too.
            return scores_by_place(
                tokens,
                lambda t: model.forward_head(t.flatten(2).transpose(1, 2).repeat(1, prefix + 1, 1)),
            )
        if getattr(model, 'output_fmt', 'NCHW') == 'NHWC':
            return scores_by_place(
                x.permute(0, 3, 1, 2), lambda t: model.forward_head(t.permute(0, 2, 3, 1))
            )
        return scores_by_place(x, model.forward_head)

    return scores, data['input_size'][-1]


def scores_by_place(x: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Classify each place of a map as if it were the whole map.

    A head that begins with a mean over places gives what it would give for this place alone.

    Args:
        x: (B, C, H, W).
        head: From maps (N, C, 1, 1) to scores (N, K).

    Returns:
        Tensor: (B, K, H, W).

    Raises:
        UserError: If x is no map.
    """
    if x.ndim != 4:
        raise UserError(
            f'the classifier gives {tuple(x.shape)} instead of a map (B, C, H, W); label maps need '
            'one whose last map is pooled'
        )
    count, channels, height, width = x.shape
    places = x.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1)
    return head(places).unflatten(0, (count, height, width)).permute(0, 3, 1, 2)


def pack(scores: Tensor, topk: int) -> Tensor:
    """The best scores and their classes, (2, topk, H, W), of the scores (K, H, W)."""
    kind = torch.float16 if len(scores) <= EXACT_HALF else torch.float32
    best = scores.topk(min(topk, len(scores)), dim=0)
    limit = torch.finfo(kind).max
    return torch.stack([best.values.clamp(-limit, limit), best.indices]).to(kind)


def main() -> None:
    """Make the label maps that are not there yet."""
    args = parse_args()
    if not args.images.is_dir():
        raise UserError(f'there is no folder {args.images}')
    scorer, usual = mmpretrain_scorer(args) if args.config else timm_scorer(args)
    size = args.size or usual
    resize = transforms.Resize((size, size), interpolation=InterpolationMode.BICUBIC)
    images = ImageFolder(args.images, transforms.Compose([resize, transforms.ToTensor()]))
    paths = [Path(path) for path, _ in images.samples]
    outputs = [args.out / path.parent.name / f'{path.stem}.pt' for path in paths]
    if len({*outputs}) != len(outputs):
        raise UserError(f'{args.images} has images of one class and name twice; rename them')
    missing = [i for i, path in enumerate(outputs) if not path.exists()]
    print(f'{len(outputs) - len(missing)} of {len(outputs)} label maps are there', flush=True)
    loader = DataLoader(Subset(images, missing), args.batch_size, num_workers=args.workers)
    start, done = time.perf_counter(), 0
    for batch, _ in loader:
        with torch.inference_mode():
            scores = scorer(batch.to(args.device)).float().cpu()
        for each, i in zip(scores, missing[done : done + len(scores)], strict=True):
            file = io.BytesIO()
            torch.save(pack(each, args.topk), file)
            write_whole(outputs[i], file.getvalue())
        done += len(scores)
        if done == len(missing) or (done // args.batch_size) % 50 == 0:
            speed = done / (time.perf_counter() - start)
            shape = 'x'.join(map(str, scores.shape[2:]))
            print(f'{done} of {len(missing)}, {speed:.0f} a second, {shape} places', flush=True)


if __name__ == '__main__':
    run_command(main)
