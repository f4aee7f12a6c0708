"""Draw where a model looks: routed regions and attention, or a BiXT's latents.

For each image it writes NAME_look.png: for the last block of each stage, or for those that --block
names, the region of a point with the regions it is routed to, and the attention of the token there.
NAME_blocks.png shows the routes of all blocks.

Examples:
    python tools/analysis_tools/visualize_routes.py configs/biformer_s_in1k.py photo.jpg \\
        --checkpoint biformer_small_best.pth --out look
    python tools/analysis_tools/visualize_routes.py configs/maskrcnn_biformer_s_coco.py photo.jpg \\
        --checkpoint epoch_12.pth --point 400 120 --block stages.2.17.attn --head 3 --out look
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import mmcv
import numpy as np
import torch
from mmengine.config import Config

from mmbiformer.commands.faults import run_command
from mmbiformer.commands.options import add_config_options, image_size, read_config
from mmbiformer.commands.runner import build_model
from mmbiformer.errors import UserError
from mmbiformer.export.images import Images
from mmbiformer.files import write_figure
from mmbiformer.models.base import Backbone
from mmbiformer.visualization import Record, record
from mmbiformer.visualization.draw import draw_routes, draw_weights, token_at
from mmbiformer.weights.fit import check_fit, load_whole_model

LATENTS = 6


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_options(parser)
    parser.add_argument('images', nargs='+', metavar='IMAGE')
    parser.add_argument('--checkpoint', help='checkpoint of the whole model (default: random)')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--point', nargs=2, type=int, metavar=('X', 'Y'), help='pixel of the image '
                        'whose region and token are shown (default: the centre)')  # fmt: skip
    parser.add_argument('--block', nargs='+', help='names of attentions, such as stages.2.17.attn')
    parser.add_argument('--head', type=int, help='head of the attention (default: mean of all)')
    parser.add_argument('--shape', type=int, nargs='+', metavar='N',
                        help='height and width that the image has to fit')  # fmt: skip
    return parser.parse_args()


def main() -> None:
    """Run the backbone on each image and draw."""
    args = parse_args()
    cfg = read_config(args)
    net = backbone_of(cfg, args.checkpoint)
    settings = {**(cfg.get('data_preprocessor') or {}), **(cfg.model.data_preprocessor or {})}
    for path in args.images:
        image = mmcv.imread(path, channel_order='rgb')
        small = mmcv.imrescale(image, image_size(cfg, args.shape)[::-1])
        height, width = small.shape[:2]
        x, y = args.point or (image.shape[1] // 2, image.shape[0] // 2)
        if not (0 <= x < image.shape[1] and 0 <= y < image.shape[0]):
            raise UserError(
                f'--point {x} {y} is not in {path}, which has {image.shape[1]}x{image.shape[0]} '
                'pixels'
            )
        point = x * width // image.shape[1], y * height // image.shape[0]
        normalize = Images.of(settings, (height, width))
        with record(net) as seen, torch.no_grad():
            net(normalize(torch.from_numpy(small)[None]))
        for name, figure in draw(seen, small, point, args.block, args.head).items():
            out = args.out / f'{Path(path).stem}_{name}.png'
            write_figure(out, figure, dpi=100)
            plt.close(figure)
            print(out)


def backbone_of(cfg: Config, checkpoint: str | None) -> Backbone:
    """Build the model with its weights; give its backbone in eval mode."""
    model = build_model(cfg)
    if not isinstance(getattr(model, 'backbone', None), Backbone):
        raise UserError(f'{cfg.filename}: model.backbone is none of mmbiformer')
    if checkpoint is None:
        print('no --checkpoint is given: the weights are random')
    else:
        loaded = load_whole_model(checkpoint)
        check_fit(model, loaded, checkpoint)
        model.load_state_dict(loaded['state_dict'], strict=False)
    return model.backbone.eval()


def choose(names: list[str], wanted: list[str] | None) -> list[int]:
    """Numbers of the blocks that are asked for, or of the last one of each stage."""
    if wanted is None:
        stages = [name.split('.')[1] if name.startswith('stages.') else name for name in names]
        if not names[0].startswith('stages.'):
            stages = [str(3 * i // len(names)) for i in range(len(names))]
        return sorted({stage: i for i, stage in enumerate(stages)}.values())
    if missing := [name for name in wanted if name not in names]:
        raise UserError(f'--block {missing[0]}: there is none; there are {", ".join(names)}')
    return [names.index(name) for name in wanted]


def draw(
    seen: Record,
    image: np.ndarray,
    point: tuple[int, int],
    wanted: list[str] | None,
    head: int | None,
) -> dict[str, plt.Figure]:
    """Draw both figures, by name."""
    if seen.exchanges:
        return dict(look=draw_latents(seen, image, wanted, head))
    blocks = seen.routed
    chosen = choose([block.name for block in blocks], wanted)
    side = 3.4
    tall = side * image.shape[0] / image.shape[1] + 0.3
    look, axes = plt.subplots(
        len(chosen), 2, figsize=(2 * side, tall * len(chosen)), layout='constrained', squeeze=False
    )
    for row, i in zip(axes, chosen, strict=True):
        block = blocks[i]
        draw_routes(row[0], image, block, 0, point)
        row[0].set_title(f'{block.name}: {block.routes.shape[2]} regions', fontsize=9, loc='left')
        weights = block.attention(0, *token_at(image, block, point))
        if head is not None and head >= len(weights):
            raise UserError(f'--head {head}: {block.name} has heads 0 to {len(weights) - 1}')
        weights = weights.mean(0) if head is None else weights[head]
        draw_weights(row[1], image, weights.numpy(), block.name, point)
        row[1].set_title('mean of the heads' if head is None else f'head {head}', fontsize=9)
    columns = min(6, len(blocks))
    rows = -(-len(blocks) // columns)
    sheet, axes = plt.subplots(
        rows, columns, figsize=(2.2 * columns, (tall * 0.65 + 0.1) * rows), layout='constrained',
        squeeze=False,
    )  # fmt: skip
    for one in axes.flat:
        one.axis('off')
    for one, block in zip(axes.flat, blocks, strict=False):
        draw_routes(one, image, block, 0, point)
        one.set_title(block.name, fontsize=7)
    return dict(look=look, blocks=sheet)


def draw_latents(
    seen: Record, image: np.ndarray, wanted: list[str] | None, head: int | None
) -> plt.Figure:
    """Draw where some latents look, block by block."""
    chosen = choose([block.name for block in seen.exchanges], wanted)
    figure, axes = plt.subplots(
        len(chosen), LATENTS, figsize=(2 * LATENTS, 2.3 * len(chosen)), layout='constrained',
        squeeze=False,
    )  # fmt: skip
    for row, i in zip(axes, chosen, strict=True):
        maps = seen.exchanges[i].maps(0)
        maps = maps.mean(0) if head is None else maps[head]
        for number, one in enumerate(row):
            one.axis('off')
            if number < len(maps):
                draw_weights(one, image, maps[number].numpy(), seen.exchanges[i].name)
                block = '' if number else f'{seen.exchanges[i].name}: '
                one.set_title(f'{block}latent {number}', fontsize=8, loc='left')
    return figure


if __name__ == '__main__':
    run_command(main)
