"""The command-line options that the files of tools/ share, and the config that they give."""

import argparse
import ast
import contextlib
import inspect
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mmengine.config import Config, DictAction
from mmengine.config import config as parser_of_configs
from mmengine.runner import Runner

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
        missed = missed_settings(cfg, args.cfg_options)
        if missed and os.environ.get('RANK', '0') == os.environ.get('SLURM_PROCID', '0') == '0':
            print(
                'warning: settings do not follow a variable of the config that --cfg-options '
                f'changes; give them instead: {" ".join(missed)}',
                file=sys.stderr,
            )
    return cfg


def missed_settings(cfg: Config, options: dict[str, Any]) -> list[str]:
    """Find settings that do not follow options, though a user may think so.

    MMEngine applies options after the config file has run. By then a variable that no Runner reads,
    such as ``data_root``, has been copied into settings that it reads. They are found by running
    the file once more, with the variable changed wherever it is assigned. If there are none, they
    are those of the variable's name.

    Args:
        cfg: The changed config.
        options: The changes.

    Returns:
        list[str]: What to give as ``--cfg-options``, such as ``train_cfg.max_epochs=1``.
    """
    read = {*inspect.signature(Runner).parameters}
    values = {}
    for name in {key.split('.')[0] for key in options} - read:
        with contextlib.suppress(SyntaxError, ValueError):  # not plain data
            values[name] = ast.parse(repr(ast.literal_eval(repr(cfg[name]))), mode='eval').body
    if not values:
        return []

    class Assigning:
        def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
            if isinstance(node.targets[0], ast.Name) and node.targets[0].id in values:
                node.value = values[node.targets[0].id]
            return super().visit_Assign(node) if hasattr(super(), 'visit_Assign') else node

    with contextlib.ExitStack() as stack:
        try:
            for name in ('RemoveAssignFromAST', 'ImportTransformer'):  # of both kinds of configs
                own = type(name, (Assigning, getattr(parser_of_configs, name)), {})
                stack.enter_context(mock.patch.object(parser_of_configs, name, own))
            other = Config.fromfile(cfg.filename, import_custom_modules=False)
            other.merge_from_dict(options)
        except Exception:  # the file cannot run with this value
            return []
    have, wanted = dict(_leaves(cfg._cfg_dict)), dict(_leaves(other._cfg_dict))
    if have == wanted:
        names = {name: str(value) for name, value in options.items()}
        wanted = {path: names.get(path.split('.')[-1], value) for path, value in have.items()}
    return [
        shlex.quote(f'{path}={value}')
        for path, value in wanted.items()
        if path.split('.')[0] in read and have.get(path) != value
    ]


def _leaves(node: Any, path: str = '') -> Iterator[tuple[str, str]]:
    if isinstance(node, list) and any(isinstance(child, dict) for child in node):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f'{path}.{key}')
    elif isinstance(node, (str, int, float, list, tuple, type(None))):
        yield path[1:], str(node)


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
