"""Train, evaluate and draw a small detector on synthetic shapes, from nothing, on CPU.

Example:
    python tools/demo.py maskrcnn
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from mmbiformer.checkpoint import register_safe_loader
from mmbiformer.datasets import make_shapes
from mmbiformer.engine.command_line import CommandError, run_command

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {'maskrcnn': 'configs/demo/maskrcnn_biformer_t_shapes.py'}
TRAIN_IMAGES, VAL_IMAGES = 400, 80


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('task', nargs='?', choices=[*CONFIGS], default='maskrcnn')
    parser.add_argument('--seed', type=int, default=0, help='seed of the scenes (default: 0)')
    return parser.parse_args()


def run(*command: str) -> None:
    """Run one of the project's commands, its output shown as it comes."""
    print('\n$ python ' + ' '.join(command), flush=True)
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if status:
        raise CommandError(f'`python {" ".join(command)}` ended with status {status}; see above')


def read_scalars(work_dir: Path) -> tuple[list[dict], list[dict]]:
    """Training and validation records of the latest run."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    train = [record for record in records if 'loss' in record]
    return train, [record for record in records if 'coco/segm_mAP' in record]


def draw_curves(work_dir: Path, out: Path) -> None:
    """Loss over iterations beside AP over epochs."""
    train, val = read_scalars(work_dir)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    steps = [record['step'] for record in train]
    for name in ('loss', 'loss_mask', 'loss_cls', 'loss_bbox'):
        left.plot(steps, [record[name] for record in train], label=name)
    left.set(xlabel='iteration', ylabel='loss', ylim=(0, None), title='training')
    left.legend(frameon=False)
    epochs = [record['step'] for record in val]
    for name, label in (
        ('segm_mAP', 'mask AP'),
        ('segm_mAP_50', 'mask AP50'),
        ('bbox_mAP', 'box AP'),
    ):
        right.plot(epochs, [record[f'coco/{name}'] for record in val], 'o-', label=label)
    right.set(xlabel='epoch', ylabel='AP', ylim=(0, 1), title='validation')
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw_instances(
    axes: plt.Axes, image: np.ndarray, masks: np.ndarray, names: list[str], labels: list[int]
) -> None:
    """Outline and name the instances of one image."""
    axes.imshow(image, interpolation='nearest')
    colours = plt.get_cmap('tab10').colors
    for mask, name, label in zip(masks, names, labels, strict=True):
        axes.contour(mask, levels=[0.5], colors=[colours[label]], linewidths=1.5)
        ys, xs = np.nonzero(mask)
        if len(xs):
            axes.text(
                xs.mean(),
                ys.mean(),
                name,
                color='white',
                fontsize=6,
                ha='center',
                va='center',
                bbox=dict(facecolor=colours[label], alpha=0.75, lw=0, boxstyle='round,pad=0.15'),
            )
    axes.axis('off')


def draw_predictions(cfg: Config, checkpoint: Path, out: Path, count: int = 4) -> None:
    """Ground truth beside prediction for the first validation images.

    Args:
        cfg: The demo's config.
        checkpoint: The trained model.
        out: File to draw into.
        count: Number of images.
    """
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    model = MODELS.build(cfg.model)
    load_checkpoint(model, str(checkpoint), map_location='cpu')
    model.eval()
    classes = dataset.metainfo['classes']
    figure, axes = plt.subplots(
        2, count, figsize=(3.6 * count, 6.2), layout='constrained', squeeze=False
    )
    for column in range(count):
        item = dataset[column]
        truth = item['data_samples'].gt_instances
        with torch.no_grad():
            found = model.test_step(pseudo_collate([item]))[0].pred_instances
        found = found[found.scores > 0.5]
        image = mmcv.imread(item['data_samples'].img_path, channel_order='rgb')
        labels = truth.labels.tolist()
        draw_instances(
            axes[0, column], image, truth.masks.to_ndarray(), [classes[i] for i in labels], labels
        )
        labels = found.labels.tolist()
        names = [f'{classes[i]} {s:.2f}' for i, s in zip(labels, found.scores, strict=True)]
        draw_instances(axes[1, column], image, found.masks.cpu().numpy(), names, labels)
    axes[0, 0].set_title('ground truth', loc='left')
    axes[1, 0].set_title('prediction (score > 0.5)', loc='left')
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main() -> None:
    """Make the data, train, evaluate, draw, and say what to do next."""
    args = parse_args()
    start = time.perf_counter()
    config = CONFIGS[args.task]
    cfg = Config.fromfile(ROOT / config)
    data = ROOT / cfg.data_root
    work_dir = ROOT / 'work_dirs' / 'demo' / args.task

    print(f'Synthetic shapes: {TRAIN_IMAGES} + {VAL_IMAGES} images in {data.relative_to(ROOT)}')
    make_shapes(data, TRAIN_IMAGES, VAL_IMAGES, args.seed, overwrite=True)
    run('tools/train.py', config, '--work-dir', str(work_dir.relative_to(ROOT)))
    checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
    checkpoint = ROOT / work_dir / checkpoint.name
    run(
        'tools/test.py',
        config,
        str(checkpoint.relative_to(ROOT)),
        '--work-dir',
        str((work_dir / 'test').relative_to(ROOT)),
    )

    register_safe_loader()
    curves, pictures = work_dir / 'curves.png', work_dir / 'predictions.png'
    draw_curves(work_dir, curves)
    draw_predictions(cfg, checkpoint, pictures)
    _, val = read_scalars(work_dir)
    print(
        f'\nDone in {(time.perf_counter() - start) / 60:.1f} min: '
        f'mask AP {val[-1]["coco/segm_mAP"]:.3f}, box AP {val[-1]["coco/bbox_mAP"]:.3f}\n'
        f'  curves       {curves.relative_to(ROOT)}\n'
        f'  predictions  {pictures.relative_to(ROOT)}\n'
        f'  checkpoint   {checkpoint.relative_to(ROOT)}\n'
        f'Next: train on your own COCO-format data, see "Your own data" in README.md;\n'
        f'or on COCO:  python tools/train.py configs/maskrcnn_biformer_s_coco.py --pretrained FILE'
    )


if __name__ == '__main__':
    run_command(main)
