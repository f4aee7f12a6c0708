"""The preflight of a run: whether its data are there and its folder is free."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from ..errors import UserError

HOSTS = 'mmengine', 'mmdet', 'mmseg', 'mmpretrain'
RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')
"""Environment variables in which launchers give the number of a process."""


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Raise a UserError if the data that a config names are not there.

    Looked at are data sets of the hosts on local disks. One is missing if neither its annotation
    file nor any of its folders exists; everything else is left to the host, which may not read all
    of them.

    Args:
        cfg: The whole config.
        splits: Which data loaders the run uses, of ``'train'``, ``'val'``, ``'test'``.
    """
    missing: list[str] = []
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset in _datasets(loader.get('dataset') if loader else None):
            paths = [*_paths(dataset)] if _is_of_host(cfg, dataset) else []
            if not any(map(os.path.exists, paths)):
                missing += paths
    if not missing:
        return
    root = os.path.commonpath(missing) if len({*map(os.path.isabs, missing)}) == 1 else ''
    link = f', or link them:  ln -s /path/to/your/data {root}' if root else ''
    raise UserError(
        f'the data of {cfg.filename} are not there.\n'
        + ''.join(f'  missing: {path}\n' for path in dict.fromkeys(missing))
        + f'Put them there, correct the paths in the config{link}\n'
        + 'To see everything work without any data:  make demo'
    )


def _datasets(dataset: Any) -> Iterator[dict]:
    """Yield the data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(dataset, (list, tuple)):
        for each in dataset:
            yield from _datasets(each)
    elif isinstance(dataset, dict):
        inner = dataset.get('dataset') or dataset.get('datasets')
        if inner is None:
            yield dataset
        else:
            yield from _datasets(inner)


def _is_of_host(cfg: Config, dataset: dict) -> bool:
    kind = dataset.get('type')
    if isinstance(kind, str):
        scope = dataset.get('_scope_') or cfg.get('default_scope')
        with DATASETS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)
    return getattr(kind, '__module__', '').partition('.')[0] in HOSTS


def _paths(dataset: dict) -> Iterator[str]:
    """Yield the annotation file and the folders that a data set names on local disks."""
    root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix') or {}
    if not isinstance(root, str) or dataset.get('backend_args'):
        return
    parts = [dataset.get('ann_file'), *(prefix.values() if isinstance(prefix, dict) else [prefix])]
    for part in filter(None, parts) if any(parts) else ['']:
        path = os.path.join(root, part) if isinstance(part, str) else ''
        if path and '://' not in path:
            yield path.rstrip('/')


def claim_work_dir(cfg: Config) -> str | None:
    """Keep other trainings out of the work folder until this process ends, however it ends.

    Two trainings in one folder would write the same checkpoints.

    Args:
        cfg: The whole config.

    Returns:
        str | None: A warning if the disk cannot lock files.

    Raises:
        UserError: If another process trains there.
    """
    path = Path(cfg.work_dir, '.lock').absolute()
    if os.environ.get(RANKS.get(cfg.launcher, ''), '0') != '0' or path in _CLAIMED:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open('a+')  # stays open: closing it would release the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers do not inherit it
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return (
                f'{cfg.work_dir} is on a disk that cannot lock files ({error.strerror}); make sure '
                'that no other training writes there.'
            )
        file.seek(0)
        raise UserError(
            f'--work-dir {cfg.work_dir}: another training is under way there '
            f'({file.read(300) or "process unknown"}); wait until it ends, stop it, or choose '
            'another --work-dir'
        ) from error
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    _CLAIMED[path] = file
    return None


_CLAIMED: dict[Path, Any] = {}
