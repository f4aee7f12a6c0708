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
from matplotlib.patheffects import withStroke
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
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
MIN_IOU = 0.5
WRONG = 'red'
IGNORED = 255


def draw_instances(axes: plt.Axes, image: np.ndarray, sample: Any, predicted: bool) -> None:
    """Outline the instances, or their boxes where the model gives no masks.

    Among the predictions, wrong ones are dashed, and dotted outlines are what the model missed.
    """
    axes.imshow(image, interpolation='nearest')
    axes.autoscale(False)
    truth = sample.gt_instances
    with_masks = 'masks' in sample.pred_instances
    if not predicted:
        for i, label in enumerate(truth.labels.tolist()):
            outline(axes, shape_of(truth, i, with_masks), sample.classes[label], COLOURS[label])
        return
    found = sample.pred_instances[sample.pred_instances.scores > MIN_SCORE]
    partners = match(found, truth, with_masks)
    for i, label in enumerate(truth.labels.tolist()):
        if i not in partners:
            text = f'missed: {sample.classes[label]}'
            outline(axes, shape_of(truth, i, with_masks), text, 'black', 'dotted')
    for i, label in enumerate(found.labels.tolist()):
        text, wrong = f'{sample.classes[label]} {found.scores[i]:.2f}', partners[i] is None
        shape = shape_of(found, i, with_masks)
        if wrong:
            outline(axes, shape, f'wrong: {text}', WRONG, 'dashed')
        else:
            outline(axes, shape, text, COLOURS[label])


def shape_of(instances: Any, index: int, with_masks: bool) -> np.ndarray:
    """Mask of an instance, (H, W), or its box: left, top, right, bottom."""
    if not with_masks:
        return get_box_tensor(instances.bboxes)[index].cpu().numpy()
    masks = instances.masks  # the ground truth's are BitmapMasks
    return masks[index].cpu().numpy() if torch.is_tensor(masks) else masks.to_ndarray()[index]


def match(found: Any, truth: Any, with_masks: bool) -> list[int | None]:
    """Find the true instance of each prediction, the surest prediction first.

    Args:
        found: Predicted instances.
        truth: True instances.
        with_masks: Whether to compare masks; else boxes are compared.

    Returns:
        list[int | None]: For each prediction the number of a true instance of its class with an
        IoU of ``MIN_IOU`` or more, which belongs to no other prediction; None for a wrong one.
    """
    partners: list[int | None] = [None] * len(found.labels)
    for i in found.scores.argsort(descending=True).tolist():
        overlaps = {
            iou(shape_of(found, i, with_masks), shape_of(truth, j, with_masks)): j
            for j, label in enumerate(truth.labels.tolist())
            if label == int(found.labels[i]) and j not in partners
        }
        best = max(overlaps, default=0)
        partners[i] = overlaps[best] if best >= MIN_IOU else None
    return partners


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) or of two boxes (4,)."""
    if one.ndim == 2:
        one, other = one > 0, other > 0
        return float((one & other).sum() / max((one | other).sum(), 1))
    return float(bbox_overlaps(torch.tensor(one)[None], torch.tensor(other)[None]))


def outline(
    axes: plt.Axes, shape: np.ndarray, text: str, colour: Any, style: str = 'solid'
) -> None:
    """Outline a mask or a box and name it. White beside the line shows it on its own colour."""
    effects = [withStroke(linewidth=4, foreground='white')]
    if shape.ndim == 2:
        if not shape.any():
            return
        padded = np.pad(shape.astype(float), 1)  # closes the outline at the image's border
        ys, xs = (np.arange(-1, length + 1) for length in shape.shape)
        lines = axes.contour(
            xs, ys, padded, levels=[0.5], colors=[colour], linewidths=2, linestyles=style
        )
        y, x = np.argwhere(shape).mean(0)
    else:
        left, top, right, bottom = shape.tolist()
        xs, ys = [left, right, right, left, left], [top, top, bottom, bottom, top]
        (lines,) = axes.plot(xs, ys, color=colour, lw=2, ls=style)
        x, y = (left + right) / 2, top
    lines.set_path_effects(effects)
    write(axes, x, y, text, colour)


def write(axes: plt.Axes, x: float, y: float, text: str, colour: Any) -> None:
    """Write a small label on a coloured ground."""
    box = dict(facecolor=colour, alpha=0.75, lw=0, boxstyle='round,pad=0.15')
    style = dict(color='white', fontsize=6, ha='center', va='center', clip_on=True)
    axes.text(x, y, text, bbox=box, **style)


def draw_map(axes: plt.Axes, image: np.ndarray, sample: Any, predicted: bool) -> None:
    """Tint and outline the classes; the background stays as it is. Wrong pixels are hatched."""
    truth = sample.gt_sem_seg.data[0].cpu().numpy()
    labels = sample.pred_sem_seg.data[0].cpu().numpy() if predicted else truth
    painted, shape = image / 255, (labels > 0) & (labels != IGNORED)
    painted[shape] = 0.35 * painted[shape] + 0.65 * COLOURS[labels[shape] - 1]
    axes.imshow(painted, interpolation='nearest')
    axes.autoscale(False)
    for label in np.unique(labels[shape]):
        ys, xs = np.nonzero(labels == label)
        middle = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
        outline(axes, labels == label, '', COLOURS[label - 1])
        write(axes, xs[middle], ys[middle], sample.classes[label], COLOURS[label - 1])
    wrong = (labels != truth) & (truth != IGNORED)
    if wrong.any():
        with plt.rc_context({'hatch.color': 'black', 'hatch.linewidth': 0.8}):
            axes.contourf(wrong, levels=[0.5, 1.5], colors='none', hatches=['xxxxx'])


def draw_label(axes: plt.Axes, image: np.ndarray, sample: Any, predicted: bool) -> None:
    """Write the class into the image; a wrong one is called so, in red."""
    axes.imshow(image, interpolation='nearest')
    label = int(sample.pred_label if predicted else sample.gt_label)
    text = sample.classes[label] + (f' {sample.pred_score.max():.2f}' if predicted else '')
    wrong = label != int(sample.gt_label)
    box = dict(facecolor='white', alpha=0.8, lw=0, boxstyle='round,pad=0.2')
    style = dict(transform=axes.transAxes, ha='right', va='bottom')
    colour, text = (WRONG, f'wrong: {text}') if wrong else ('black', text)
    axes.text(0.98, 0.02, text, color=colour, bbox=box, **style)


# Meanings of the marks in a prediction.
LEGENDS = {draw_instances: ' (dashed: wrong, dotted: missed)', draw_map: ' (hatched: wrong)'}


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
    axes[1, 0].set_title('prediction' + LEGENDS.get(draw, ''), loc='left')
    write_figure(out, figure, dpi=100)


@dataclass(frozen=True)
class Demo:
    """One task of the demo.

    Attributes:
        prefix: Beginning of its configs' names.
        format: Format of its data, see ``mmbiformer/shapes/formats.py``.
        images: Images to train and to validate on.
        metrics: Names of the validation metrics and what to call them.
        aim: What the first metric should reach with BiFormer-T.
        draw: Draws the ground truth or the prediction of one image.
    """

    prefix: str
    format: str
    images: tuple[int, int]
    metrics: dict[str, str]
    aim: float
    draw: Callable[..., None]


BOXES = {'coco/bbox_mAP': 'box AP', 'coco/bbox_mAP_50': 'box AP50'}
MASKS = {'coco/segm_mAP': 'mask AP', 'coco/segm_mAP_50': 'mask AP50', 'coco/bbox_mAP': 'box AP'}
REGIONS = {'mIoU': 'mIoU', 'aAcc': 'pixel accuracy'}
TOP1 = {'accuracy/top1': 'top-1 accuracy'}
DEMOS = {
    'maskrcnn': Demo('maskrcnn_', 'coco', (400, 80), MASKS, 0.50, draw_instances),
    'retinanet': Demo('retinanet_', 'coco', (400, 80), BOXES, 0.45, draw_instances),
    'sfpn': Demo('sfpn_', 'ade20k', (400, 80), REGIONS, 0.75, draw_map),
    'upernet': Demo('upernet_', 'ade20k', (400, 80), REGIONS, 0.75, draw_map),
    'classification': Demo('', 'imagenet', (7020, 700), TOP1, 0.95, draw_label),
}

# DeBiFormer has BiFormer's widths, so that necks and heads fit. It routes to up to 49 regions.
DEBIFORMER = {'model.backbone.type': 'mmbiformer.DeBiFormer', 'model.backbone.region_grid': 7}
# Changes of the config for each backbone. BiXT has configs of its own.
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
        f'{verdict(demo, args.model, found)}'
        f'  curves       {work_dir}/curves.png\n'
        f'  predictions  {work_dir}/predictions.png\n'
        f'  checkpoint   {checkpoint}\n' + next_steps(f'{config} {checkpoint}', ' '.join(options))
    )


def verdict(demo: Demo, model: str, found: dict[str, float]) -> str:
    """Say whether the demo has met its aim, in one line; empty for a backbone without an aim.

    Args:
        demo: The task.
        model: The backbone.
        found: The metrics by what they are called, up to 1; empty if nothing was detected.
    """
    if model != 'biformer_t':
        return ''
    label = next(iter(demo.metrics.values()))
    if label not in found:
        word = 'missed, nothing was detected'
    else:
        word = 'met' if found[label] >= demo.aim else 'missed'
    return f'  aim          {word} ({label} {demo.aim:.2f})\n'


def next_steps(model: str, options: str) -> str:
    """Say what works next in a fresh shell.

    Args:
        model: The config and the checkpoint.
        options: Changes to the config, as options of the commands; may be empty.
    """
    activate = ''
    if sys.prefix != sys.base_prefix:
        environment = Path(sys.prefix)
        if environment.is_relative_to(ROOT):
            environment = environment.relative_to(ROOT)
        activate = f'  source {shlex.quote(str(environment))}/bin/activate\n'
    return (
        'Next, in any shell (the last line paints every prediction into shown/):\n'
        f'  cd {shlex.quote(str(ROOT))}\n{activate}'
        f'  {f"python tools/test.py {model} --show-dir shown {options}".rstrip()}\n'
        'An image of yours, and your own data, for which you copy the config of your task from\n'
        'docs/training.md into mine.py:\n'
        f'  {f"python tools/predict.py {model} IMAGE --out predicted {options}".rstrip()}\n'
        '  python tools/analysis_tools/browse_dataset.py mine.py --output-dir look --not-show\n'
        '  python tools/train.py mine.py'
    )


def scale(metric: str) -> float:
    """Best value of a metric: COCO's go to 1, the others are percentages."""
    return 1 if metric.startswith('coco/') else 100


if __name__ == '__main__':
    run_command(main)
