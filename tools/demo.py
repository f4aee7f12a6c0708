"""Train, evaluate and draw a small model on synthetic shapes, from nothing, on CPU.

Examples:
    python tools/demo.py maskrcnn
    python tools/demo.py upernet --model debiformer_t --seed 1
"""

import argparse
import json
import os
import shlex
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
from mmengine.registry import DATASETS
from mmengine.runner import load_checkpoint

from mmbiformer.commands.faults import run_command
from mmbiformer.commands.runner import build_model
from mmbiformer.errors import UserError
from mmbiformer.files import write_figure
from mmbiformer.shapes import make_shapes

ROOT = Path(__file__).resolve().parent.parent
COLOURS = np.array(plt.get_cmap('tab10').colors)
PICTURES = 4
MIN_SCORE = 0.5


def draw_instances(axes: plt.Axes, image: np.ndarray, sample: Any, predicted: bool) -> None:
    """Outline the instances, or their boxes where the model gives no masks."""
    axes.imshow(image, interpolation='nearest')
    axes.autoscale(False)
    instances = sample.pred_instances if predicted else sample.gt_instances
    if predicted:
        instances = instances[instances.scores > MIN_SCORE]
    for i, label in enumerate(instances.labels.tolist()):
        name, colour = sample.classes[label], COLOURS[label]
        if predicted:
            name += f' {instances.scores[i]:.2f}'
        if 'masks' in sample.pred_instances:
            masks = instances.masks  # the ground truth's are BitmapMasks
            mask = masks[i].cpu().numpy() if torch.is_tensor(masks) else masks.to_ndarray()[i]
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.5)
            if mask.any():
                y, x = np.argwhere(mask).mean(0)
                write(axes, x, y, name, colour)
        else:
            left, top, right, bottom = get_box_tensor(instances.bboxes)[i].tolist()
            x, y = [left, right, right, left, left], [top, top, bottom, bottom, top]
            axes.plot(x, y, color=colour, lw=1.5)
            write(axes, (left + right) / 2, top, name, colour)


def write(axes: plt.Axes, x: float, y: float, text: str, colour: Any) -> None:
    """Write a small label on a coloured ground."""
    box = dict(facecolor=colour, alpha=0.75, lw=0, boxstyle='round,pad=0.15')
    style = dict(color='white', fontsize=6, ha='center', va='center', clip_on=True)
    axes.text(x, y, text, bbox=box, **style)


def draw_map(axes: plt.Axes, image: np.ndarray, sample: Any, predicted: bool) -> None:
    """Tint each pixel with its class; the background stays as it is."""
    field = sample.pred_sem_seg if predicted else sample.gt_sem_seg
    labels = field.data[0].cpu().numpy()
    painted, shape = image / 255, labels > 0
    painted[shape] = 0.35 * painted[shape] + 0.65 * COLOURS[labels[shape] - 1]
    axes.imshow(painted, interpolation='nearest')
    for label in np.unique(labels[shape]):
        ys, xs = np.nonzero(labels == label)
        middle = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
        write(axes, xs[middle], ys[middle], sample.classes[label], COLOURS[label - 1])


def draw_label(axes: plt.Axes, image: np.ndarray, sample: Any, predicted: bool) -> None:
    """Write the class into the image; a wrong one in red."""
    axes.imshow(image, interpolation='nearest')
    label = int(sample.pred_label if predicted else sample.gt_label)
    text = sample.classes[label] + (f' {sample.pred_score.max():.2f}' if predicted else '')
    box = dict(facecolor='white', alpha=0.8, lw=0, boxstyle='round,pad=0.2')
    style = dict(transform=axes.transAxes, ha='right', va='bottom')
    colour = 'black' if label == int(sample.gt_label) else 'red'
    axes.text(0.98, 0.02, text, color=colour, bbox=box, **style)


def draw_predictions(cfg: Config, checkpoint: Path, draw: Callable[..., None], out: Path) -> None:
    """Draw the ground truth above the prediction for a few validation images.

    Args:
        cfg: The demo's config.
        checkpoint: The trained model.
        draw: Draws the ground truth or the prediction of one image, see above.
        out: File to draw into.
    """
    model = build_model(cfg)
    load_checkpoint(model, str(checkpoint), map_location='cpu')
    model.eval()
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    figure, axes = plt.subplots(
        2, PICTURES, figsize=(3.6 * PICTURES, 6.2), layout='constrained', squeeze=False
    )
    for column in range(PICTURES):
        # Spread over the whole set, because that of single shapes is in order of classes.
        item = dataset[column * len(dataset) // PICTURES]
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([item]))[0]
        sample.set_field(dataset.metainfo['classes'], 'classes', field_type='metainfo')
        truth = item['data_samples']
        if 'gt_instances' in truth:  # the model has removed it from its own sample
            sample.gt_instances = truth.gt_instances
        image = mmcv.imread(truth.img_path, channel_order='rgb')
        for row in range(2):
            draw(axes[row, column], image, sample, predicted=row == 1)
    for one in axes.flat:
        one.axis('off')
    axes[0, 0].set_title('ground truth', loc='left')
    axes[1, 0].set_title('prediction', loc='left')
    write_figure(out, figure, dpi=100)


@dataclass(frozen=True)
class Demo:
    """One task of the demo.

    Attributes:
        prefix: Beginning of its configs' names.
        format: Format of its data, see ``mmbiformer/shapes/formats.py``.
        images: Images to train and to validate on.
        metrics: Names of the validation metrics and what to call them.
        draw: Draws the ground truth or the prediction of one image.
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
    'sfpn': Demo('sfpn_', 'ade20k', (400, 80), REGIONS, draw_map),
    'upernet': Demo('upernet_', 'ade20k', (400, 80), REGIONS, draw_map),
    'classification': Demo('', 'imagenet', (7020, 700), TOP1, draw_label),
}

# DeBiFormer has BiFormer's widths, so that necks and heads fit. It routes to up to 49 regions.
DEBIFORMER = {'model.backbone.type': 'mmbiformer.DeBiFormer', 'model.backbone.region_grid': 7}
# What each backbone changes in the config. BiXT has configs of its own.
BACKBONES = {
    'biformer_t': {},
    'debiformer_t': DEBIFORMER,
    'bixt_ti': {},
}
BIXT_TASKS = 'classification', 'sfpn'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('task', nargs='?', choices=[*DEMOS], default='maskrcnn')
    parser.add_argument('--model', choices=[*BACKBONES], default='biformer_t')
    parser.add_argument('--seed', type=int, default=0, help='seed of the scenes (default: 0)')
    args = parser.parse_args()
    if args.model == 'bixt_ti' and args.task not in BIXT_TASKS:
        parser.error(f'{args.task} is not shown with bixt_ti; take {" or ".join(BIXT_TASKS)}')
    return args


def run(*command: Any) -> None:
    """Run one of the project's commands and show its output as it comes."""
    text = 'python ' + ' '.join(map(str, command))
    print(f'\n$ {text}', flush=True)
    status = subprocess.run([sys.executable, *map(str, command)]).returncode
    if status:
        raise UserError(f'`{text}` ended with status {status}; see above')


def main() -> None:
    """Make the data, train, evaluate, draw, and say what works next."""
    args = parse_args()
    demo = DEMOS[args.task]
    start = time.perf_counter()
    os.chdir(ROOT)  # the paths in the configs begin there
    own = 'bixt_ti' if args.model == 'bixt_ti' else 'biformer_t'
    config = f'configs/demo/{demo.prefix}{own}_shapes.py'
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(BACKBONES[args.model])
    data = Path(cfg.train_dataloader.dataset.data_root)
    work_dir = Path('work_dirs', 'demo', f'{demo.prefix}{args.model}_shapes')

    train_images, val_images = demo.images
    print(f'Synthetic shapes: {train_images} + {val_images} images in {data}')
    make_shapes(data, train_images, val_images, args.seed, overwrite=True, format=demo.format)
    options = [f'{key}={value}' for key, value in BACKBONES[args.model].items()]
    options = ['--cfg-options', *options] if options else []
    run('tools/train.py', config, '--work-dir', work_dir, *options)
    checkpoint = work_dir / Path((work_dir / 'last_checkpoint').read_text().strip()).name
    test = ['tools/test.py', config, checkpoint, *options]
    run(*test, '--work-dir', work_dir / 'test')
    run('tools/analysis_tools/plot_logs.py', work_dir)
    draw_predictions(cfg, checkpoint, demo.draw, work_dir / 'predictions.png')

    tested = json.loads(max(work_dir.glob('test/*/*.json')).read_text())
    # MMDetection gives no metrics if a model detects nothing.
    found = {
        label: tested[key] / scale(key) for key, label in demo.metrics.items() if key in tested
    }
    metrics = ', '.join(f'{label} {value:.3f}' for label, value in found.items())
    minutes = (time.perf_counter() - start) / 60
    print(
        f'\nDone in {minutes:.1f} min: {metrics}\n'
        f'  curves       {work_dir}/curves.png\n'
        f'  predictions  {work_dir}/predictions.png\n'
        f'  checkpoint   {checkpoint}\n'
        + next_steps(f'python {" ".join(map(str, test))} --show-dir shown')
    )


def next_steps(test: str) -> str:
    """Say what works next in a fresh shell.

    Args:
        test: The command that paints the predictions into the folder ``shown``.
    """
    activate = ''
    if sys.prefix != sys.base_prefix:
        environment = Path(sys.prefix)
        if environment.is_relative_to(ROOT):
            environment = environment.relative_to(ROOT)
        activate = f'  source {shlex.quote(str(environment))}/bin/activate\n'
    return (
        'Next, in any shell (the last line paints every prediction into shown/):\n'
        f'  cd {shlex.quote(str(ROOT))}\n{activate}  {test}\n'
        'Your own data: copy the config of your task from docs/training.md into mine.py, then\n'
        '  python tools/analysis_tools/browse_dataset.py mine.py --output-dir look --not-show\n'
        '  python tools/train.py mine.py'
    )


def scale(metric: str) -> float:
    """Best value of a metric: COCO's go to 1, the others are percentages."""
    return 1 if metric.startswith('coco/') else 100


if __name__ == '__main__':
    run_command(main)
