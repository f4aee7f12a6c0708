"""Train any config of this project: detection, segmentation or classification.

Examples:
    python tools/train.py configs/maskrcnn_biformer_s_coco.py --pretrained biformer_small_best.pth
    python tools/train.py configs/demo/maskrcnn_biformer_t_shapes.py --resume
"""

import argparse

from mmbiformer.engine.checks import check_data, check_training
from mmbiformer.engine.command_line import (
    add_common_options,
    build_runner,
    check_record,
    drop_amp_without_gpu,
    drop_sync_bn_without_gpu,
    load_config,
    make_resumable,
    random_weights_message,
    run_command,
    use_pretrained,
)
from mmbiformer.engine.faults import faults_explained


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument(
        '--pretrained', metavar='FILE', help="weights of the backbone; the authors' files will do"
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from CHECKPOINT, or without one from the latest in the work folder',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the total batch size over that of the recipe',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate while training')
    return parser.parse_args()


def main() -> None:
    """Build the runner from the config and train."""
    args = parse_args()
    cfg = load_config(args)
    check_record(cfg)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.auto_scale_lr:
        cfg.auto_scale_lr = dict(cfg.get('auto_scale_lr') or {}, enable=True)
    check_training(cfg)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    messages = make_resumable(cfg, args.resume)
    splits = ('train',) if args.no_validate else ('train', 'val')
    use_pretrained(cfg, args.pretrained)
    check_data(cfg, splits)
    changes = [drop_amp_without_gpu(cfg), drop_sync_bn_without_gpu(cfg)]
    runner = build_runner(cfg, splits)
    for message in [*messages, *changes, random_weights_message(cfg)]:
        if message:
            runner.logger.warning(message)
    with faults_explained(cfg, splits):
        runner.train()


if __name__ == '__main__':
    run_command(main)
