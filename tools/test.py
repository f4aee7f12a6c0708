"""Evaluate a checkpoint with any config of this project.

Examples:
    python tools/test.py configs/maskrcnn_biformer_s_coco.py work_dirs/…/epoch_12.pth
    python tools/test.py configs/biformer_s_in1k.py biformer_small_best.pth   # the authors' file
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.fileio import dump
from mmengine.logging import print_log
from mmengine.registry import METRICS, VISBACKENDS
from mmengine.visualization import LocalVisBackend

from mmbiformer.checkpoint import check_fit, load_whole_model
from mmbiformer.datasets.shapes_formats import encode_image
from mmbiformer.engine.checks import (
    CommandError,
    check_apart,
    check_data,
    check_file,
    check_testing,
    check_writable,
    type_name,
)
from mmbiformer.engine.command_line import (
    add_common_options,
    build_runner,
    load_config,
    run_command,
)
from mmbiformer.engine.faults import faults_explained
from mmbiformer.engine.files import write_whole


@METRICS.register_module(force=True)
class DumpWholeResults(DumpResults):
    """Leaves no half a file where the disk is full."""

    def compute_metrics(self, results: list) -> dict:
        """Write the predictions."""
        write_whole(self.out_file_path, dump(results, file_format='pkl'))
        print_log(f'Wrote the predictions to {self.out_file_path}.', logger='current')
        return {}


@VISBACKENDS.register_module(force=True)
class WholePictures(LocalVisBackend):
    """Ends where the disk is full: OpenCV leaves half a picture, and calls that a success."""

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        """Write a picture, RGB."""
        path = Path(self.experiment._img_save_dir, f'{name}_{step}.png')
        write_whole(path, encode_image(path, image))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to a pickle file')
    parser.add_argument('--show-dir', metavar='DIR', help='paint the predictions into a folder')
    parser.add_argument('--tta', action='store_true', help='augment at test time')
    return parser.parse_args()


def main() -> None:
    """Build the runner from the config, load the checkpoint and test."""
    args = parse_args()
    cfg = load_config(args)
    if args.out is not None:
        if not args.out.endswith(('.pkl', '.pickle')):
            raise CommandError(f'--out {args.out}: the file must end in .pkl or .pickle')
        if os.path.isdir(args.out):
            raise CommandError(f'--out {args.out} is a folder; give FOLDER/NAME.pkl')
        check_writable(os.path.dirname(args.out) or '.', '--out')
    if args.show_dir is not None:
        check_apart(cfg, args.show_dir, '--show-dir')
        check_writable(args.show_dir, '--show-dir')
    check_file(args.checkpoint, 'checkpoint')
    check_data(cfg, ('test',))
    checkpoint = load_whole_model(args.checkpoint)
    check_testing(cfg)
    cfg.load_from = args.checkpoint
    if args.out is not None:
        written = dict(type='DumpWholeResults', out_file_path=args.out)
        cfg.test_evaluator = [*_as_list(cfg.test_evaluator), written]
    if args.show_dir is not None:
        paint(cfg, args.show_dir)
    if args.tta:
        augment(cfg)
        if args.show_dir is not None and cfg.default_scope == 'mmpretrain':
            raise CommandError('--show-dir: MMPretrain cannot paint with --tta; leave one out')
    # Nothing of training is needed; the painter of MMSegmentation 1.2 would load its images.
    cfg.train_cfg = cfg.train_dataloader = cfg.optim_wrapper = cfg.param_scheduler = None
    runner = build_runner(cfg, ('test',))
    check_fit(runner.model, checkpoint, args.checkpoint)
    del checkpoint
    with faults_explained(cfg, ('test',)):
        runner.test()


def paint(cfg: Config, folder: str) -> None:
    """Switch the host's visualization hook on; each host has its own name for the folder."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise CommandError(f'--show-dir: {cfg.filename} has no visualization hook')
    if cfg.get('visualizer') is None:
        raise CommandError(
            f'--show-dir: {cfg.filename} has no visualizer = dict(...), which paints'
        )
    kind = type_name(hook).rpartition('.')[2]
    if kind == 'VisualizationHook':  # mmpretrain
        hook.update(enable=True, out_dir=folder, interval=1)
    elif kind == 'SegVisualizationHook':
        hook.update(draw=True, interval=1)
        cfg.visualizer.save_dir = folder
        backends = _as_list(cfg.visualizer.get('vis_backends') or [])
        local = [x for x in backends if type_name(x).rpartition('.')[2] == 'LocalVisBackend']
        if not local:
            raise CommandError(
                f'--show-dir: visualizer.vis_backends of {cfg.filename} has no LocalVisBackend, '
                "which writes pictures; add dict(type='LocalVisBackend')"
            )
        for backend in local:
            backend.type = 'WholePictures'
    else:
        hook.update(draw=True, test_out_dir=os.path.abspath(folder))


def augment(cfg: Config) -> None:
    """Test with the augmentations that the config brings."""
    if cfg.model.get('roi_head', {}).get('mask_head'):
        raise CommandError(
            '--tta: MMDetection cannot merge masks of augmented images; leave it out'
        )
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise CommandError(f'--tta: {cfg.filename} has no tta_model and tta_pipeline')
    if 'data_preprocessor' in cfg:  # mmpretrain's stands beside the model, which would lose it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def _as_list(evaluators: list | dict) -> list:
    return list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]


if __name__ == '__main__':
    run_command(main)
