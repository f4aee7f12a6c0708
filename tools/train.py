"""Train any config of this project: detection, segmentation or classification.

Examples:
    python tools/train.py configs/maskrcnn_biformer_s_coco.py --pretrained biformer_small_best.pth
    python tools/train.py configs/demo/maskrcnn_biformer_t_shapes.py --resume
"""

import argparse

from mmbiformer.commands.faults import run_command
from mmbiformer.commands.options import add_run_options, load_config
from mmbiformer.commands.preflight import check_data, claim_work_dir
from mmbiformer.commands.runner import (
    build_runner,
    choose_checkpoint,
    drop_amp_without_gpu,
    random_weights_message,
    use_pretrained,
)
from mmbiformer.engine.hooks import CheckLengthHook, SanityRunHook


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_options(parser)
    parser.add_argument(
        '--pretrained', metavar='FILE', help="weights of the backbone, such as the authors' files"
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from CHECKPOINT, or from the latest one in the work folder',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the total batch size over that of the recipe',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate while training')
    parser.add_argument(
        '--no-sanity-run',
        action='store_true',
        help='start without trying a training batch and two validation batches first',
    )
    return parser.parse_args()


def main() -> None:
    """Build the runner from the config and train."""
    args = parse_args()
    cfg = load_config(args)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.auto_scale_lr:
        cfg.auto_scale_lr = dict(cfg.get('auto_scale_lr') or {}, enable=True)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    use_pretrained(cfg, args.pretrained)
    check_data(cfg, ('train', 'val'))
    warnings = [claim_work_dir(cfg), *choose_checkpoint(cfg, args.resume)]
    warnings += [drop_amp_without_gpu(cfg), random_weights_message(cfg)]
    runner = build_runner(cfg)
    runner.register_hook(CheckLengthHook())
    if not args.no_sanity_run:
        runner.register_hook(SanityRunHook())
    for warning in filter(None, warnings):
        runner.logger.warning(warning)
    runner.train()


if __name__ == '__main__':
    run_command(main)
