"""What the commands in tools/ share: options, config, checks before anything runs."""

import argparse
import errno
import fcntl
import gc
import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.dist import master_only
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, DataLoader

from ..checkpoint import AUTHORS_URLS, load_whole_model, register_safe_loader
from ..safe_load import CheckpointError
from .check_annotations_hook import CheckAnnotationsHook
from .check_classes_hook import CheckClassesHook
from .checkpoint_hook import check_resumable, find_whole_checkpoint, sampler_of
from .checks import (
    SPLITS,
    CommandError,
    check_file,
    check_options,
    check_parts,
    check_settings,
    check_splits,
    check_writable,
    disk_problem,
    error_text,
    escaped,
    file_problem,
    has_our_backbone,
    is_of_other_process,
    is_out_of_memory,
    type_name,
)
from .fake_data import SIZES
from .files import WriteError, write_whole

TORCHRUN = 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT'
"""Numbers in the environment by which processes find each other."""
RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')
"""Where launchers say which of the processes this is."""
STARTERS = 'tools/dist_train.sh or tools/dist_test.sh'

MAX_SIDE = 2**20
"""Of an image in pixels, as for OpenCV."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command; a user's error ends it with one message and exit status 2, Ctrl-C with 130.

    Args:
        main: The command.
    """
    logging.raiseExceptions = False  # a log that is not written would hide what the command says
    try:
        if sys.flags.optimize > 1:  # the help is made of docstrings, here and in libraries
            raise CommandError(
                f'PYTHONOPTIMIZE={sys.flags.optimize} (or -OO) takes the docstrings out of Python, '
                'which the commands need; unset it'
            )
        main()
        # No process of several leaves while another may still speak to it.
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            # What still refers to the group would keep its threads, and one of those that runs
            # while the interpreter comes down aborts the process.
            gc.collect()
            torch.distributed.destroy_process_group()
        return
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except (CommandError, CheckpointError) as error:
        message = str(error)
    except OSError as error:
        files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
        # Without a name it is nothing of a user's; in a training it needs its traceback.
        ours = error.filename is None or any(file.endswith('runner/runner.py') for file in files)
        message = disk_problem(error) or (None if ours else file_problem(error, error.filename))
        if message is None:
            raise
    except (AssertionError, RecursionError, ValueError) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        # All that MMEngine says of --cfg-options is how many values it could not unpack.
        given = [frame for frame in frames if frame.f_code is DictAction.__call__.__code__]
        if not given:
            raise
        message = f'--cfg-options {given[0].f_locals["kv"]}: give KEY=VALUE, brackets closed'
    except (MemoryError, RuntimeError) as error:
        text = (str(error).strip().splitlines() or ['out of memory'])[0]
        if is_out_of_memory(error):
            message = f'{text}\nMake the batch or the images smaller, or free memory'
        elif torch.distributed.is_initialized() and is_of_other_process(error):
            message = f'another process of this job ended: {text}. See its own message'
        else:
            raise
    message = f'error: {escaped(message)}'
    print(message, file=sys.stderr)
    # torchrun shows what is there at the end of its own report, in which the message would be lost.
    if path := os.environ.get('TORCHELASTIC_ERROR_FILE'):
        report = json.dumps(dict(message=message, timestamp=int(time.time())))
        Path(path).write_text(report, encoding='utf-8')
    sys.exit(2)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The config, and changes to it, as in the OpenMMLab libraries."""
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. train_dataloader.batch_size=4',
    )


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options that training and testing share, named as in the OpenMMLab libraries."""
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
        CommandError: If there is no such config, or it cannot be read.
    """
    if not Path(args.config).is_file():
        raise CommandError(
            f'there is no config {args.config}; the configs of this project are in configs/, '
            f'for example configs/maskrcnn_biformer_s_coco.py'
        )
    register_safe_loader()
    try:
        cfg = Config.fromfile(args.config)
        if args.cfg_options is not None:
            check_options(cfg, args.cfg_options)
            cfg.merge_from_dict(args.cfg_options)
    except CommandError:
        raise
    except RecursionError as error:
        raise CommandError(f'{args.config} cannot be read: does its _base_ name itself?') from error
    except Exception as error:  # a config is Python: anything can be wrong with it
        last_line = (str(error).strip().splitlines() or [''])[-1]
        raise CommandError(
            disk_problem(error)  # MMEngine copies it to read it
            or f'{args.config} cannot be read: {type(error).__name__}: {last_line}'
        ) from error
    check_settings(cfg)
    init_cfg = (cfg.model.get('backbone') or {}).get('init_cfg')
    if isinstance(init_cfg, dict) and 'checkpoint' in init_cfg:  # all that an option need name
        init_cfg.setdefault('type', 'Pretrained')
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read the config file and apply the common options.

    Args:
        args: Parsed options, see :func:`add_common_options`.

    Returns:
        Config: With ``work_dir`` and ``launcher`` set.

    Raises:
        CommandError: If there is no such config, the work folder cannot be written, or variables of
            the environment have odd values.
    """
    check_environment(args.launcher)
    cfg = read_config(args)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    check_writable(cfg.work_dir)
    return cfg


def check_record(cfg: Config) -> None:
    """Raise CommandError if the config that a training writes would replace the user's own.

    One that a training wrote may be replaced: a run goes on from it.

    Args:
        cfg: The whole config, with its work folder.
    """
    record = Path(cfg.work_dir, Path(cfg.filename).name)
    if not record.exists() or not record.samefile(cfg.filename):
        return
    if record.read_text(encoding='utf-8') != Config.fromfile(cfg.filename).dump():
        raise CommandError(
            f'--work-dir {cfg.work_dir}: training writes the whole config there, over {record}, '
            f'which is your own; choose another folder, such as work_dirs/{record.stem}'
        )


class _HasBatches:
    """A runner that stops at a data loader without a batch: it would end without a word."""

    def build_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Build it, and count its batches."""
        loader = super().build_dataloader(*args, **kwargs)
        sampler, batches = sampler_of(loader), loader.batch_sampler
        endless = hasattr(sampler, '_indices_of_rank')  # as InfiniteSampler
        if isinstance(batches, BatchSampler) and not len(batches) and not endless:
            raise ValueError(
                f'it has no batch: batch_size={batches.batch_size} and '
                f'drop_last={batches.drop_last}, but {len(sampler)} images a process; lower '
                'batch_size or set drop_last=False'
            )
        return loader


class _WritesWholeConfig(_HasBatches):
    """A runner whose config, from which a run may go on, is no half one on a full disk."""

    @master_only
    def dump_config(self) -> None:
        """Write it into the work folder."""
        name = Path(self.cfg.filename or f'{self.timestamp}.py').name
        write_whole(Path(self.work_dir, name), self.cfg.dump().encode())


class _LeavesNoConfig(_HasBatches):
    """A runner that tests: its config, which the log has, could train nothing more."""

    def dump_config(self) -> None:
        """Leave the one that training wrote."""


def check_environment(launcher: str) -> None:
    """Raise CommandError if a variable has a value at which a library would fail.

    Args:
        launcher: As given with ``--launcher``.
    """
    names = ('LOCAL_RANK',) if launcher == 'none' else TORCHRUN
    advice = f'unset it, or start processes with {STARTERS}, which set it'
    for name in names:
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit()):
            raise CommandError(f'{name}={value!r} in the environment must be an int; {advice}')
    rank, processes = (os.environ.get(name) for name in ('RANK', 'WORLD_SIZE'))
    if launcher == 'pytorch' and rank is not None:
        if missing := [name for name in (*TORCHRUN, 'MASTER_ADDR') if name not in os.environ]:
            raise CommandError(
                f'--launcher pytorch: RANK={rank} is in the environment, but not '
                f'{" and ".join(missing)}; start processes with {STARTERS}, which set them all'
            )
        if int(rank) >= int(processes):  # it would wait for others for ever
            raise CommandError(
                f'RANK={rank} in the environment must be below WORLD_SIZE={processes}; start '
                f'processes with {STARTERS}, which set both'
            )
    try:
        import matplotlib  # noqa: F401  (which reads MPLBACKEND)
    except ValueError as error:
        backend = os.environ.get('MPLBACKEND')
        raise CommandError(
            f'MPLBACKEND={backend!r} in the environment: {error}. Unset it, or set it to agg'
        ) from error


def claim_work_dir(cfg: Config) -> str | None:
    """Keep other trainings out of the work folder until this process ends, however it ends.

    Two at once would write the same files: half checkpoints under whole names, in the end.

    Args:
        cfg: The whole config.

    Returns:
        str | None: What to tell the user where the disk has no locks.

    Raises:
        CommandError: If another process trains there.
    """
    path = os.path.join(os.path.abspath(cfg.work_dir), '.lock')
    if os.environ.get(RANKS.get(cfg.launcher, ''), '0') != '0' or path in _CLAIMED:
        return None
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
        # In a folder from someone else a link may lead to a file of the user's.
        raise CommandError(f'{path} is no plain file; remove it, or choose another --work-dir')
    warning = None
    file = open(path, 'a+')  # noqa: SIM115  (closed, it would be free)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which no forked worker inherits
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise CommandError(
                f'--work-dir {cfg.work_dir}: another training is under way there '
                f'({file.read(300) or "of an unknown process"}); wait until it ends or end it, '
                'or choose another --work-dir'
            ) from error
        warning = (
            f'{cfg.work_dir} is on a disk that cannot lock files ({error.strerror}): nothing would '
            'keep a second training out of it; see to it that there is none.'
        )
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    _CLAIMED[path] = file
    return warning


_CLAIMED: dict[str, Any] = {}


def build_runner(cfg: Config, splits: tuple[str, ...] = SPLITS) -> Runner:
    """Build the runner, and with it the model, that a config asks for.

    Args:
        cfg: The whole config.
        splits: Which data loaders and evaluators are used. Defaults to all.

    Raises:
        CommandError: If the config's values do not fit, or the launcher needs GPUs.
    """
    on_cpu = cfg.launcher != 'none' and get_device() == 'cpu'
    if on_cpu:
        distribute_on_cpu(cfg)
    check_splits(cfg)
    check_parts(cfg, splits)
    warning = claim_work_dir(cfg) if 'train' in splits else None
    try:
        kind = cfg.get('runner_type', Runner)
        if isinstance(kind, str):
            with RUNNERS.switch_scope_and_registry(None) as found:
                if found.get(kind) is None:
                    raise KeyError(f'runner_type={kind} is not in the {found.name} registry')
                kind = found.get(kind)
        own = _WritesWholeConfig if 'train' in splits else _LeavesNoConfig
        kind = type(kind.__name__, (own, kind), {})
        runner = kind.from_cfg(cfg)
    except WriteError:
        raise
    except (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise CommandError(f'{cfg.filename} cannot be built: {error_text(error)}') from error
    runner.register_hook(CheckClassesHook())
    runner.register_hook(CheckAnnotationsHook())
    if warning is not None:
        runner.logger.warning(warning)
    if on_cpu:
        runner.logger.warning(
            f'No GPU: {runner.world_size} processes on CPU with the backend gloo.'
        )
    return runner


def image_size(cfg: Config, shape: list[int] | None) -> tuple[int, int]:
    """Height and width of an image as asked for, or as is usual for the host.

    Args:
        cfg: The whole config.
        shape: One or two numbers of pixels, or None.

    Raises:
        CommandError: If it is anything else, or the host is not known.
    """
    if shape is None:
        scope = cfg.get('default_scope')
        if scope not in SIZES:
            raise CommandError(f'{cfg.filename}: default_scope={scope!r} must be one of {[*SIZES]}')
        return SIZES[scope]
    if len(shape) > 2 or min(shape) < 1 or max(shape) > MAX_SIDE:
        raise CommandError(
            f'--shape {" ".join(map(str, shape))}: give height and width in pixels, 1 to {MAX_SIDE}'
        )
    return shape[0], shape[-1]


def distribute_on_cpu(cfg: Config) -> None:
    """Join the other processes, and make the config fit, where MMEngine would call for a GPU.

    Args:
        cfg: The whole config; changed in place.

    Raises:
        CommandError: If the processes were not started by torchrun.
    """
    if cfg.launcher != 'pytorch' or 'RANK' not in os.environ:
        raise CommandError(
            f'--launcher {cfg.launcher}: there is no GPU here; on CPU start several processes with '
            f'{STARTERS}'
        )
    drop_sync_bn_without_gpu(cfg)
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    torch.distributed.init_process_group('gloo')


def make_resumable(cfg: Config, resume: str | None = None) -> list[str]:
    """Write checkpoints that a killed run resumes from exactly; find the one to resume from.

    Where the work folder has none at all, the run starts as it would without ``--resume``.

    Args:
        cfg: The whole config; changed in place.
        resume: A checkpoint, or ``'auto'`` for the latest in the work folder. Defaults to None:
            what the config says.

    Returns:
        list[str]: What to tell the user about damaged files, and those of an earlier run.

    Raises:
        CommandError: If what is removed under the name of an old checkpoint would be a new one, or
            no checkpoint could be written.
    """
    hooks = cfg.default_hooks = cfg.get('default_hooks') or ConfigDict()
    hook = hooks.setdefault('checkpoint', ConfigDict(type='CheckpointHook'))
    if hook is not None and type_name(hook) in ('CheckpointHook', 'mmengine.CheckpointHook'):
        hook.type = 'mmbiformer.CheckpointHook'
    _check_names(cfg, hook or {})
    if '://' not in (folder := _checkpoint_folder(cfg)):  # else hours would pass until the first
        check_writable(folder, 'default_hooks.checkpoint.out_dir')
    register_safe_loader()
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    told = []
    if resume == 'auto':
        resume, told = find_whole_checkpoint(cfg.work_dir, _checkpoint_folder(cfg))
    elif resume is not None:
        check_file(resume, '--resume')
        check_resumable(resume, load_whole_model(resume))
    cfg.resume = resume is not None
    if cfg.resume:
        cfg.load_from = resume
        return told
    if cfg.get('load_from') is not None and '://' not in cfg.load_from and has_our_backbone(cfg):
        check_file(cfg.load_from, 'load_from')
        load_whole_model(cfg.load_from)
    return told + _earlier_run(cfg)


def _earlier_run(cfg: Config) -> list[str]:
    folder = Path(_checkpoint_folder(cfg))
    found = sorted(path.name for name in ('epoch', 'iter') for path in folder.glob(f'{name}_*.pth'))
    if not found:
        return []
    return [
        f'{folder} holds checkpoints of an earlier run, such as {found[0]}. This run starts anew '
        'and will replace them: to go on from them, stop it and give --resume; to keep them, '
        'another --work-dir.'
    ]


def _checkpoint_folder(cfg: Config) -> str:
    """Where MMEngine's hook writes: in its out_dir, a folder named like the work folder."""
    work_dir = os.path.abspath(cfg.work_dir)
    out_dir = (cfg.default_hooks.get('checkpoint') or {}).get('out_dir')
    if not isinstance(out_dir, str) or out_dir == work_dir:
        return work_dir
    return os.path.join(out_dir, os.path.basename(work_dir))


def _check_names(cfg: Config, hook: dict[str, Any]) -> None:
    template, kept = hook.get('filename_tmpl'), hook.get('max_keep_ckpts')
    if not isinstance(template, str) or not isinstance(kept, int) or kept < 1:
        return
    try:
        names = {template.format(step) for step in (1, 2)}
    except (AttributeError, IndexError, KeyError, ValueError):
        names = set()
    if len(names) < 2:
        raise CommandError(
            f'{cfg.filename}: default_hooks.checkpoint.filename_tmpl={template!r:.80} gives '
            f'checkpoints no names of their own, of which max_keep_ckpts={kept} could remove the '
            "oldest; put {} where their number belongs, as in 'epoch_{}.pth', or set "
            'max_keep_ckpts=-1: each then replaces the one before it'
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
    url = AUTHORS_URLS.get(type_name(backbone).rpartition('.')[2], AUTHORS_URLS['BiFormer'])
    return (
        'The backbone starts from random weights. Published figures of detection and segmentation '
        f'need the ImageNet weights that the authors publish at {url}: download a file and '
        'give it as --pretrained FILE.'
    )


def drop_amp_without_gpu(cfg: Config) -> str | None:
    """Train in float32 where MMEngine has no mixed precision, which is on CPU.

    Args:
        cfg: The whole config; changed in place.

    Returns:
        str | None: What to tell the user, if anything was changed.
    """
    amp = type_name(cfg.optim_wrapper).rpartition('.')[2] == 'AmpOptimWrapper'
    if not amp or torch.cuda.is_available():
        return None
    cfg.optim_wrapper.type = 'OptimWrapper'
    for key in ('loss_scale', 'dtype'):
        cfg.optim_wrapper.pop(key, None)
    return 'No GPU: training in float32 instead of mixed precision.'


def drop_sync_bn_without_gpu(cfg: Config) -> str | None:
    """Train with plain BatchNorm where torch has no synchronised one, which is on CPU.

    Args:
        cfg: The whole config; changed in place.

    Returns:
        str | None: What to tell the user, if anything was changed.
    """
    if torch.cuda.is_available():
        return None
    found = cfg.pop('sync_bn', None) is not None
    stack: list[Any] = [cfg.model]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if type_name(node).rpartition('.')[2] in ('SyncBN', 'MMSyncBN', 'SyncBatchNorm'):
                node['type'], found = 'BN', True
            stack += node.values()
        elif isinstance(node, (list, tuple)):
            stack += node
    return 'No GPU: training with BatchNorm in each process instead of SyncBN.' if found else None
