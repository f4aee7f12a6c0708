"""The command-line options that the files of tools/ share, and the config that they give."""

import argparse
import os
from pathlib import Path

from mmengine.config import Config, DictAction

from ..errors import UserError

SIZES = dict(mmpretrain=(224, 224), mmdet=(800, 1280), mmseg=(512, 512))
"""Height and width of an image in pixels, as is usual for each host."""


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the config and changes to it, as in the OpenMMLab libraries."""
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. train_dataloader.batch_size=4',
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of training and testing, named as in the OpenMMLab libraries."""
    add_config_options(parser)
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints (default: work_dirs/CONFIG_NAME)'
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher (default: none)',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def read_config(args: argparse.Namespace) -> Config:
    """Read the config file and change it as asked.

    Args:
        args: Parsed options, see :func:`add_config_options`.

    Raises:
        UserError: If there is no such file.
    """
    if not Path(args.config).is_file():
        raise UserError(
            f'there is no config {args.config}; the configs of this project are in configs/, '
            f'for example configs/maskrcnn_biformer_s_coco.py'
        )
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read the config of a run.

    Args:
        args: Parsed options, see :func:`add_run_options`.

    Returns:
        Config: With ``work_dir`` and ``launcher`` set.

    Raises:
        UserError: If there is no such file.
    """
    cfg = read_config(args)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    return cfg


def image_size(cfg: Config, shape: list[int] | None) -> tuple[int, int]:
    """Choose the height and width of an image.

    Args:
        cfg: The whole config.
        shape: One number of pixels for both, or two, or None for what is usual for the host.

    Raises:
        UserError: If there are more numbers, one below 1, or the host is not known.
    """
    if shape is None:
        scope = cfg.get('default_scope')
        if scope not in SIZES:
            raise UserError(
                f'{cfg.filename} has default_scope={scope!r}, for which no usual size is known; '
                'give --shape HEIGHT WIDTH'
            )
        return SIZES[scope]
    if len(shape) > 2 or min(shape) < 1:
        raise UserError(
            f'--shape {" ".join(map(str, shape))}: give height and width in pixels, from 1'
        )
    return shape[0], shape[-1]
