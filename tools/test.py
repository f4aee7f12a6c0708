"""Evaluate a checkpoint with any config of this project.

Examples:
    python tools/test.py configs/maskrcnn_biformer_s_coco.py work_dirs/…/epoch_12.pth
    python tools/test.py configs/biformer_s_in1k.py biformer_small_best.pth   # the authors' file
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.model import is_model_wrapper
from mmengine.registry import METRICS, MODELS, init_default_scope
from mmengine.runner import Runner

from mmbiformer.commands.faults import run_command
from mmbiformer.commands.options import add_run_options, load_config
from mmbiformer.commands.preflight import check_data
from mmbiformer.commands.runner import build_runner
from mmbiformer.errors import UserError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_options(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        metavar='FILE.pkl',
        help='write the predictions to a pickle file, or label maps of MMSegmentation to a folder',
    )
    parser.add_argument('--show-dir', metavar='DIR', help='paint the predictions into a folder')
    parser.add_argument('--tta', action='store_true', help='augment at test time')
    return parser.parse_args()


def main() -> None:
    """Build the runner from the config, load the checkpoint and test."""
    args = parse_args()
    cfg = load_config(args)
    check_data(cfg, ('test',))
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show_dir is not None:
        paint(cfg, args.show_dir)
    if args.tta:
        augment(cfg)
    runner = build_runner(cfg)
    if args.out is not None:
        dump(runner, args.out)
    runner.test()


def dump(runner: Runner, path: str) -> None:
    """Write the predictions as the host's own command does."""
    metrics = runner.test_evaluator.metrics
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    hosts = {part.__module__.split('.')[0] for part in type(model).__mro__}
    hosts.add(runner.cfg.get('default_scope'))
    folders = [metric for metric in metrics if hasattr(metric, 'output_dir')]
    if folders and not path.endswith(('.pkl', '.pickle')):  # MMSegmentation's label maps
        os.makedirs(path, exist_ok=True)
        folders[0].output_dir = path
    elif 'mmdet' in hosts:  # keeps masks as run lengths and leaves the ground truth out
        kind = METRICS.get('mmdet.DumpDetResults')
        metrics.append(kind(path))
    else:
        metrics.append(DumpLabels(path))


class DumpLabels(DumpResults):
    """MMEngine's ``DumpResults`` without the maps of logits, which take 100 times as much."""

    def process(self, data_batch: Any, predictions: Sequence[dict]) -> None:
        """Keep what is no map of logits and no ground truth of one."""
        left_out = 'seg_logits', 'gt_sem_seg'
        kept = [{k: v for k, v in each.items() if k not in left_out} for each in predictions]
        super().process(data_batch, kept)


def paint(cfg: Config, folder: str) -> None:
    """Switch on the host's visualization hook; each host has its own name for the folder.

    Raises:
        UserError: If the config has no such hook.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise UserError(f'--show-dir: {cfg.filename} has no default_hooks.visualization')
    host = cfg.get('default_scope')
    if host == 'mmpretrain':
        hook.update(enable=True, out_dir=folder, interval=1)
    elif host == 'mmseg':
        hook.update(draw=True, interval=1)
        cfg.visualizer.save_dir = folder
        # To paint, MMSegmentation 1.2 asks the training loop, which would load its data.
        cfg.train_cfg = cfg.train_dataloader = cfg.optim_wrapper = cfg.param_scheduler = None
    else:
        hook.update(draw=True, test_out_dir=os.path.abspath(folder))


def augment(cfg: Config) -> None:
    """Test with the augmentations that the config brings.

    Raises:
        UserError: If the config has none, or the model gives masks, which MMDetection cannot merge.
    """
    if cfg.model.get('roi_head', {}).get('mask_head'):
        raise UserError('--tta: MMDetection cannot merge masks of augmented images; leave it out')
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise UserError(f'--tta: {cfg.filename} has no tta_model and tta_pipeline')
    if 'data_preprocessor' in cfg:  # MMPretrain's stands beside the model, which would lose it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    kind = cfg.tta_model.type
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    if getattr(kind, '__module__', '') == 'mmseg.models.segmentors.seg_tta':
        cfg.tta_model.type = 'mmbiformer.SegTTAModel'  # the same in less memory
        cfg.model.setdefault('_scope_', cfg.default_scope)
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


if __name__ == '__main__':
    run_command(main)
