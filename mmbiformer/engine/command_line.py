"""What tools/train.py and tools/test.py share: options, config, checks before anything runs."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..checkpoint import AUTHORS_URL, register_safe_loader
from ..safe_load import CheckpointError


class CommandError(Exception):
    """What the user must mend; shown as one message, without a traceback."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command; a user's error ends it with one message and exit status 2.

    Args:
        main: The command.
    """
    try:
        main()
    except (CommandError, CheckpointError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options that training and testing share, named as in the OpenMMLab libraries."""
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints (default: work_dirs/CONFIG_NAME)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. train_dataloader.batch_size=4',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher (default: none)',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config file and apply the common options.

    Args:
        args: Parsed options, see :func:`add_common_options`.

    Returns:
        Config: With ``work_dir`` and ``launcher`` set.

    Raises:
        CommandError: If there is no such config.
    """
    if not Path(args.config).is_file():
        raise CommandError(
            f'there is no config {args.config}; the configs of this project are in configs/, '
            f'for example configs/maskrcnn_biformer_s_coco.py'
        )
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    register_safe_loader()
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Build the runner, and with it the model, that a config asks for.

    Args:
        cfg: The whole config.

    Raises:
        CommandError: If the config's values do not fit.
    """
    try:
        return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    except ValueError as error:
        raise CommandError(f'{cfg.filename} cannot be built: {error}') from error


def check_file(path: str, what: str) -> None:
    """Raise CommandError unless there is such a file; http(s) URLs pass.

    Args:
        path: Path or URL.
        what: What the file is, for the message.
    """
    if path.startswith(('http://', 'https://')):
        return
    if '://' in path:
        raise CommandError(f'{what}: {path} is no file or http(s) URL; download it first')
    if not Path(path).expanduser().is_file():
        raise CommandError(f'{what}: there is no file {path}')


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Raise CommandError, saying how the folder must look, if a data set is not there.

    Args:
        cfg: The whole config.
        splits: Which data loaders will be used, of ``'train'``, ``'val'``, ``'test'``.
    """
    needed: list[str] = []
    for split in splits:
        if loader := cfg.get(f'{split}_dataloader'):
            for dataset in _datasets(loader.dataset):
                needed += [path for path in _paths(dataset) if path not in needed]
    missing = [path for path in needed if '://' not in path and not os.path.exists(path)]
    if not missing:
        return
    root = os.path.commonpath(missing) if len(missing) > 1 else os.path.dirname(missing[0])
    advice = 'Put the data there'
    if not os.path.exists(root):
        advice += f', or link it:  ln -s /path/to/your/data {root}'
    raise CommandError(
        f'the data set of {cfg.filename} is not there.\n'
        + ''.join(f'  missing: {path}\n' for path in missing)
        + 'The config expects these files and folders:\n'
        + ''.join(f'  {path}\n' for path in sorted(needed))
        + f'{advice}\nTo see everything work without any data:  make demo'
    )


def use_pretrained(cfg: Config, checkpoint: str | None) -> None:
    """Set the file of the backbone's weights.

    Args:
        cfg: The whole config; changed in place.
        checkpoint: Path or URL, or None to leave the config as it is; the authors' files are taken
            as they are.
    """
    if checkpoint is not None:
        check_file(checkpoint, '--pretrained')
        cfg.model.backbone.init_cfg = ConfigDict(type='Pretrained', checkpoint=checkpoint)


def random_weights_message(cfg: Config) -> str | None:
    """What to tell a user whose backbone starts from random weights; None if it does not."""
    backbone = cfg.model.backbone
    if backbone.get('init_cfg') or cfg.get('load_from') or cfg.get('resume'):
        return None
    return (
        'The backbone starts from random weights. Published figures of detection and segmentation '
        f'need the ImageNet weights that the authors publish at {AUTHORS_URL}: download a file and '
        'give it as --pretrained FILE.'
    )


def drop_amp_without_gpu(cfg: Config) -> None:
    """Train in float32 where MMEngine has no mixed precision, which is on CPU."""
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and not torch.cuda.is_available():
        print('No GPU: training in float32 instead of mixed precision.')
        cfg.optim_wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype'):
            cfg.optim_wrapper.pop(key, None)


def _datasets(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    if inner := dataset.get('dataset') or dataset.get('datasets'):
        for child in inner if isinstance(inner, (list, tuple)) else [inner]:
            yield from _datasets(child)
    else:
        yield dataset


def _paths(dataset: ConfigDict) -> Iterator[str]:
    """The annotation file and the folders that a data set reads."""
    root = dataset.get('data_root') or ''
    parts: list[Any] = [dataset.get('ann_file')]
    prefix = dataset.get('data_prefix') or {}
    parts += prefix.values() if isinstance(prefix, dict) else [prefix]
    if not any(parts):
        parts = [dataset.get('split') or '']
    for part in parts:
        if isinstance(part, str) and (part or root):
            yield os.path.join(root, part).rstrip('/')
