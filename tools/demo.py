"""Train, evaluate and draw a small model on synthetic shapes, from nothing, on CPU.

Examples:
    python tools/demo.py maskrcnn
    python tools/demo.py upernet --model debiformer_t --seed 1
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import mmcv
import numpy as np
import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from mmbiformer.checkpoint import register_safe_loader
from mmbiformer.datasets import make_shapes
from mmbiformer.engine.checks import CommandError
from mmbiformer.engine.command_line import run_command
from mmbiformer.engine.files import write_figure

ROOT = Path(__file__).resolve().parent.parent
COLOURS = np.array(plt.get_cmap('tab10').colors)
PICTURES = 4
MIN_SCORE = 0.5

# Pictures --------------------------------------------------------------------------------------
# Each function draws the ground truth and the prediction of one image into two axes.


def draw_instances(above: plt.Axes, below: plt.Axes, image: np.ndarray, sample: Any) -> None:
    """Outline the instances, or their boxes where the model gives no masks."""
    found = sample.pred_instances
    found = found[found.scores > MIN_SCORE]
    truth = sample.gt_instances
    for axes, instances in ((above, truth), (below, found)):
        scores = [f' {score:.2f}' for score in instances.get('scores', [])]
        scores = scores or [''] * len(instances)
        axes.imshow(image, interpolation='nearest')
        for i, label in enumerate(instances.labels.tolist()):
            name = sample.classes[label] + scores[i]
            if 'masks' in found:
                outline_mask(axes, np.asarray(masks_of(instances)[i]), name, COLOURS[label])
            else:
                box = get_box_tensor(instances.bboxes)[i].tolist()
                outline_box(axes, box, name, COLOURS[label])


def masks_of(instances: Any) -> np.ndarray:
    """Masks as booleans, whether they are the ground truth's or predicted."""
    masks = instances.masks
    return masks.cpu().numpy() if isinstance(masks, torch.Tensor) else masks.to_ndarray()


def outline_mask(axes: plt.Axes, mask: np.ndarray, name: str, colour: np.ndarray) -> None:
    """One instance as the outline of its mask."""
    axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.5)
    ys, xs = np.nonzero(mask)
    if len(xs):
        write(axes, xs.mean(), ys.mean(), name, colour)


def outline_box(axes: plt.Axes, box: list[float], name: str, colour: np.ndarray) -> None:
    """One instance as its box, (x0, y0, x1, y1) in pixels."""
    left, top, right, bottom = box
    axes.plot(
        [left, right, right, left, left], [top, top, bottom, bottom, top], color=colour, lw=1.5
    )
    write(axes, (left + right) / 2, top, name, colour)


def write(axes: plt.Axes, x: float, y: float, text: str, colour: Any) -> None:
    """A small label on a coloured ground."""
    axes.text(
        x,
        y,
        text,
        color='white',
        fontsize=6,
        ha='center',
        va='center',
        clip_on=True,
        bbox=dict(facecolor=colour, alpha=0.75, lw=0, boxstyle='round,pad=0.15'),
    )


def draw_maps(above: plt.Axes, below: plt.Axes, image: np.ndarray, sample: Any) -> None:
    """Tint each pixel with its class; the background stays as it is."""
    for axes, field in ((above, sample.gt_sem_seg), (below, sample.pred_sem_seg)):
        labels = field.data[0].cpu().numpy()
        painted = image / 255
        shape = labels > 0
        painted[shape] = 0.35 * painted[shape] + 0.65 * COLOURS[labels[shape] - 1]
        axes.imshow(painted, interpolation='nearest')
        for label in np.unique(labels[shape]):
            ys, xs = np.nonzero(labels == label)
            middle = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
            write(axes, xs[middle], ys[middle], sample.classes[label], COLOURS[label - 1])


def draw_label(above: plt.Axes, below: plt.Axes, image: np.ndarray, sample: Any) -> None:
    """The class above the image; a wrong one in red."""
    truth, found = int(sample.gt_label), int(sample.pred_label)
    for axes, label, score in (
        (above, truth, ''),
        (below, found, f' {sample.pred_score.max():.2f}'),
    ):
        axes.imshow(image, interpolation='nearest')
        colour = 'black' if label == truth else 'red'
        axes.text(
            0.98,
            0.02,
            sample.classes[label] + score,
            transform=axes.transAxes,
            color=colour,
            ha='right',
            va='bottom',
            bbox=dict(facecolor='white', alpha=0.8, lw=0, boxstyle='round,pad=0.2'),
        )


def draw_predictions(cfg: Config, checkpoint: Path, draw: Callable[..., None], out: Path) -> None:
    """Ground truth above prediction for the first validation images.

    Args:
        cfg: The demo's config.
        checkpoint: The trained model.
        draw: Draws one image twice, see above.
        out: File to draw into.
    """
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    model = MODELS.build(dict(cfg.model, data_preprocessor=preprocessor(cfg)))
    load_checkpoint(model, str(checkpoint), map_location='cpu')
    model.eval()
    figure, axes = plt.subplots(
        2, PICTURES, figsize=(3.6 * PICTURES, 6.2), layout='constrained', squeeze=False
    )
    for column in range(PICTURES):
        # The data set is in order of classes, if it is one of single shapes.
        item = dataset[column * len(dataset) // PICTURES]
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([item]))[0]
        sample.set_field(dataset.metainfo['classes'], 'classes', field_type='metainfo')
        truth = item['data_samples']
        if 'gt_instances' in truth:  # the model has taken it out of its own
            sample.gt_instances = truth.gt_instances
        image = mmcv.imread(truth.img_path, channel_order='rgb')
        draw(axes[0, column], axes[1, column], image, sample)
    for one in axes.flat:
        one.axis('off')
    axes[0, 0].set_title('ground truth', loc='left')
    axes[1, 0].set_title('prediction', loc='left')
    write_figure(out, figure, dpi=100)
    plt.close(figure)


def preprocessor(cfg: Config) -> dict | None:
    """The data preprocessor, which MMPretrain's configs keep beside the model."""
    return cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')


# Curves ----------------------------------------------------------------------------------------


def read_scalars(work_dir: Path, metric: str) -> tuple[list[dict], list[dict]]:
    """Training and validation records of the latest run."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    train = [record for record in records if 'loss' in record]
    return train, [record for record in records if metric in record]


def draw_curves(train: list[dict], val: list[dict], metrics: dict[str, str], out: Path) -> None:
    """Losses over iterations beside the metrics."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    losses = [name for name in train[0] if 'loss' in name and 'rpn' not in name]
    for name in losses[:4]:
        left.plot([r['step'] for r in train], [r[name] for r in train], label=name)
    left.set(xlabel='iteration', ylabel='loss', ylim=(0, None), title='training')
    steps = [record['step'] for record in val]
    for name, label in metrics.items():
        right.plot(steps, [record[name] / scale(name) for record in val], 'o-', label=label)
    unit = 'epoch' if steps[-1] < train[-1]['step'] else 'iteration'
    right.set(xlabel=unit, ylim=(0, 1), title='validation', xticks=steps)
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    write_figure(out, figure, dpi=120)
    plt.close(figure)


def scale(metric: str) -> float:
    """What a metric is at its best: COCO's are parts of one, the others' percent."""
    return 1 if metric.startswith('coco/') else 100


# Tasks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    """What one task shows.

    Attributes:
        prefix: What the names of its configs begin with.
        format: Format of its data, see ``mmbiformer/datasets/shapes_formats.py``.
        images: Images to train and to validate on.
        metrics: Names of the validation metrics and what to call them, the foremost first.
        draw: Draws one image twice.
    """

    prefix: str
    format: str
    images: tuple[int, int]
    metrics: dict[str, str]
    draw: Callable[..., None]


BOXES = {'coco/bbox_mAP': 'box AP', 'coco/bbox_mAP_50': 'box AP50'}
MASKS = {'coco/segm_mAP': 'mask AP', 'coco/segm_mAP_50': 'mask AP50', 'coco/bbox_mAP': 'box AP'}
REGIONS = {'mIoU': 'mIoU', 'aAcc': 'pixel accuracy'}
TOP1 = {'accuracy/top1': 'top-1 accuracy'}
DEMOS = {
    'maskrcnn': Demo('maskrcnn_', 'coco', (400, 80), MASKS, draw_instances),
    'retinanet': Demo('retinanet_', 'coco', (400, 80), BOXES, draw_instances),
    'sfpn': Demo('sfpn_', 'ade20k', (400, 80), REGIONS, draw_maps),
    'upernet': Demo('upernet_', 'ade20k', (400, 80), REGIONS, draw_maps),
    'classification': Demo('', 'imagenet', (7020, 700), TOP1, draw_label),
}

# Both have the same widths, so that necks and heads fit as they are. DeBiFormer routes to up to 49
# regions.
DEBIFORMER = {'model.backbone.type': 'mmbiformer.DeBiFormer', 'model.backbone.region_grid': 7}
BACKBONES = {'biformer_t': {}, 'debiformer_t': DEBIFORMER}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('task', nargs='?', choices=[*DEMOS], default='maskrcnn')
    parser.add_argument('--model', choices=[*BACKBONES], default='biformer_t')
    parser.add_argument('--seed', type=int, default=0, help='seed of the scenes (default: 0)')
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f'--seed {args.seed} must be 0 or above')
    return args


def run(*command: str) -> None:
    """Run one of the project's commands, its output shown as it comes."""
    print('\n$ python ' + ' '.join(command), flush=True)
    status = subprocess.run([sys.executable, *command]).returncode
    if status:
        raise CommandError(f'`python {" ".join(command)}` ended with status {status}; see above')


def main() -> None:
    """Make the data, train, evaluate, draw, and say what to do next."""
    args = parse_args()
    demo = DEMOS[args.task]
    start = time.perf_counter()
    os.chdir(ROOT)  # the paths in the configs begin there
    config = f'configs/demo/{demo.prefix}biformer_t_shapes.py'
    changes = BACKBONES[args.model]
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(changes)
    data = Path(cfg.train_dataloader.dataset.data_root)
    work_dir = Path('work_dirs', 'demo', f'{demo.prefix}{args.model}_shapes')

    train_images, val_images = demo.images
    print(f'Synthetic shapes: {train_images} + {val_images} images in {data}')
    make_shapes(data, train_images, val_images, args.seed, overwrite=True, format=demo.format)
    options = [f'{key}={value}' for key, value in changes.items()]
    options = ['--cfg-options', *options] if options else []
    run('tools/train.py', config, '--work-dir', str(work_dir), *options)
    name = Path((work_dir / 'last_checkpoint').read_text().strip()).name
    checkpoint = work_dir / name
    run('tools/test.py', config, str(checkpoint), '--work-dir', str(work_dir / 'test'), *options)

    register_safe_loader()
    curves, pictures = work_dir / 'curves.png', work_dir / 'predictions.png'
    train, val = read_scalars(work_dir, next(iter(demo.metrics)))
    draw_curves(train, val, demo.metrics, curves)
    draw_predictions(cfg, checkpoint, demo.draw, pictures)
    reached = ', '.join(
        f'{label} {val[-1][name] / scale(name):.3f}' for name, label in demo.metrics.items()
    )
    print(
        f'\nDone in {(time.perf_counter() - start) / 60:.1f} min: {reached}\n'
        f'  curves       {curves}\n'
        f'  predictions  {pictures}\n'
        f'  checkpoint   {checkpoint}\n'
        'Next: train on your own data, see "Your own data" in README.md, or by the published '
        f'recipe:\n  python tools/train.py configs/{recipe(demo, args.model)}.py'
    )


def recipe(demo: Demo, model: str) -> str:
    """Name of the published recipe's config."""
    data = 'in1k' if demo.format == 'imagenet' else demo.format
    return f'{demo.prefix}{model.removesuffix("_t")}_s_{data}'


if __name__ == '__main__':
    run_command(main)
