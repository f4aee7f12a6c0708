"""Evaluate a checkpoint with any config of this project.

Examples:
    python tools/test.py configs/maskrcnn_biformer_s_coco.py work_dirs/…/epoch_12.pth
    python tools/test.py configs/biformer_s_in1k.py biformer_small_best.pth   # the authors' file
"""

import argparse

from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmbiformer.engine.command_line import (
    CommandError,
    add_common_options,
    check_data,
    check_file,
    load_config,
    run_command,
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to a pickle file')
    parser.add_argument(
        '--show-dir', metavar='DIR', help='paint predictions into WORK_DIR/TIMESTAMP/DIR'
    )
    return parser.parse_args()


def main() -> None:
    """Build the runner from the config, load the checkpoint and test."""
    args = parse_args()
    cfg = load_config(args)
    check_file(args.checkpoint, 'checkpoint')
    check_data(cfg, ('test',))
    cfg.load_from = args.checkpoint
    if args.out is not None:
        if not args.out.endswith(('.pkl', '.pickle')):
            raise CommandError(f'--out {args.out}: the file must end in .pkl or .pickle')
        cfg.test_evaluator = _as_list(cfg.test_evaluator) + [
            dict(type='DumpResults', out_file_path=args.out)
        ]
    if args.show_dir is not None:
        if 'visualization' not in cfg.get('default_hooks', {}):
            raise CommandError(f'--show-dir: {args.config} has no visualization hook')
        hook = cfg.default_hooks.visualization
        hook.update({'enable' if hook.type == 'VisualizationHook' else 'draw': True})
        hook['out_dir' if hook.type == 'VisualizationHook' else 'test_out_dir'] = args.show_dir
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.test()


def _as_list(evaluators: list | dict) -> list:
    return list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]


if __name__ == '__main__':
    run_command(main)
