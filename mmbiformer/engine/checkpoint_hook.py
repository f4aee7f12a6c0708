"""Checkpoints of a run that may be killed at any moment, and that goes on as if it had not been."""

import contextlib
import itertools
import operator
import os
import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import LBFGS, SGD, Optimizer, SparseAdam
from torch.utils.data import BatchSampler, DataLoader

from ..checkpoint import check_fit
from ..registry import HOOKS
from ..safe_load import CheckpointError, controls_terminal, safe_load
from .files import PARTIAL, write_whole

# What torch's optimizers count or average for a parameter of any shape.
COUNTERS = {'step', 'eta', 'mu', 'mu_product'}
MAX_PATH = 2**16  # characters of the path in a file last_checkpoint
# What changes in schedulers as they go, or is in the optimizer too.
PROGRESS = {'base_values', 'best', 'cooldown_counter', 'num_bad_epochs'}


@register_backend('AtomicBackend')
class AtomicBackend(LocalBackend):
    """Writes local files whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes; MMEngine's checkpoints go through here."""
        write_whole(
            filepath,
            obj,
            'Earlier checkpoints are untouched. Make room or mend the folder, then go on from the '
            'last one with --resume',
        )


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """MMEngine's ``CheckpointHook``, made so that a killed run resumes bit for bit.

    - A checkpoint is written under another name and renamed, and only then older ones are removed:
      at any moment there is a whole one, and a whole best one.
    - It holds the state of the random number generators of each rank and the seed of the sampler.
      Validation draws from the generators but leaves them as they were.
    - Workers of the data loader are seeded anew, by the run's seed and the iteration, where a run
      may resume: at every epoch, or in iteration-based training after every checkpoint. There the
      training data go on at the iteration's place in the sampler's order.

    Resumed on the same number of ranks, a run equals one that was not killed as far as the device's
    kernels are deterministic. Arguments are those of MMEngine's hook.

    Raises:
        ValueError: If an argument is unknown, or ``interval`` or ``max_keep_ckpts`` is 0, by which
            MMEngine's would write none but the last, or keep all.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args:  # MMEngine's would fail at them when it first writes
            raise ValueError(f'CheckpointHook takes no argument {next(iter(self.args))!r}')
        for name, meaning in (('interval', 'none but the last'), ('max_keep_ckpts', 'all')):
            if getattr(self, name) == 0:
                raise ValueError(f'{name}=0 must be a positive int, or -1 for {meaning}')
        self._states: list[dict] | None = None  # to be saved, one a rank
        self._before_val: dict | None = None
        self._resumed: dict | None = None
        self._configured: dict | None = None  # settings before the checkpoint's were restored

    def before_train(self, runner: Runner) -> None:
        """Take over the writing of local files and the order of the data; restore what resumed."""
        _check_same_point(runner)
        info = runner.message_hub.runtime_info
        steps = info.get('keep_ckpt_ids')
        if not isinstance(steps, list) or not all(type(step) is int for step in steps):
            info.pop('keep_ckpt_ids', None)
        super().before_train(runner)
        self._forget_foreign_best(info)
        if type(self.file_backend) is LocalBackend:
            self.file_backend = AtomicBackend()
            self.backend_args = dict(backend='AtomicBackend')
            if is_main_process():  # what a killed run left, as large as a checkpoint
                for path in Path(self.out_dir).glob(f'.*.pth{PARTIAL}'):
                    with contextlib.suppress(OSError):
                        path.unlink()
        loop = runner.train_loop
        if runner._resume:
            _warn_if_finished(runner)
        if self._resumed is not None:
            self._restore(runner, self._resumed)
        if self._configured is not None:
            _warn_of_settings(runner, self._configured)
        if isinstance(loop, IterBasedTrainLoop) and _can_skip(loop.dataloader):
            loop.dataloader_iterator = _Batches(loop.dataloader, runner)

    def before_train_epoch(self, runner: Runner) -> None:
        """Let each epoch begin with workers of its own seeds."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            _seed_workers(runner.train_loop.dataloader, runner)

    def before_val(self, runner: Runner) -> None:
        """Remember the random state: a resumed run does not validate again."""
        self._before_val = random_state()

    def after_val(self, runner: Runner) -> None:
        """Go on as if validation had drawn no random numbers."""
        set_random_state(self._before_val)
        self._before_val = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the random state, as plain data."""
        if self._states is not None:
            seed = getattr(sampler_of(runner.train_loop.dataloader), 'seed', None)
            checkpoint['random_state'] = dict(ranks=self._states, sampler_seed=seed)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """If the run resumes: check what MMEngine will restore, keep the random state for later."""
        if runner._resume:
            # Before the optimizer, whose groups are other ones too in a file of another model.
            whole = isinstance(runner, Runner) and not any(
                isinstance(module, FullyShardedDataParallel) for module in runner.model.modules()
            )
            check_fit(runner.model, checkpoint, runner._load_from, missing_too=whole)
            self._configured = _settings(runner)
            _check_state(runner, checkpoint)
            self._resumed = checkpoint.get('random_state')

    def _forget_foreign_best(self, info: dict[str, Any]) -> None:
        """Forget the best checkpoint that a resumed file names, unless it is of this run.

        MMEngine removes it, file or whole folder, when a better one is there.
        """
        folder = Path(self.out_dir).resolve()
        paths = getattr(self, 'best_ckpt_path_dict', {})  # there is one with several metrics
        for name in [name for name in info if name.startswith('best_ckpt')]:
            best = info[name] if isinstance(info[name], str) else ''
            if type(self.file_backend) is LocalBackend:
                path = Path(best)
                own = path.parent.resolve() == folder and path.name.startswith('best_')
                own = own and path.is_file() and not path.is_symlink()
            else:
                own = best.startswith(f'{self.out_dir}/best_')
            if own:
                continue
            del info[name]
            metric = name.removeprefix('best_ckpt_')
            if name == 'best_ckpt':
                self.best_ckpt_path = None
            elif metric in paths:
                paths[metric] = None

    def _restore(self, runner: Runner, saved: dict) -> None:
        sampler = sampler_of(runner.train_loop.dataloader)
        try:
            if saved['sampler_seed'] is not None and hasattr(sampler, 'seed'):
                sampler.seed = operator.index(saved['sampler_seed'])
            ranks = len(saved['ranks'])
            if ranks == runner.world_size:
                set_random_state(saved['ranks'][get_rank()])
        except Exception as error:  # it may hold anything
            raise CheckpointError(
                f'{runner._load_from} is damaged, its random_state cannot be restored: '
                f'{_reason(error)}'
            ) from error
        if ranks != runner.world_size:
            runner.logger.warning(
                f'The checkpoint is of {ranks} processes, this run has {runner.world_size}: '
                'random numbers and the order of the data will differ.'
            )

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        """Keep the best checkpoint so far until the next is whole: MMEngine removes it before."""
        if not self.save_best:
            return
        paths = getattr(self, 'best_ckpt_path_dict', vars(self))  # there is one with several
        names = [*paths] if paths is not vars(self) else ['best_ckpt_path']
        old = {name: paths[name] for name in names}
        paths.update(dict.fromkeys(names))  # what it does not know it does not remove
        super()._save_best_checkpoint(runner, metrics)
        paths.update({name: path for name, path in old.items() if paths[name] is None})
        for path in {*old.values()} - {None, *(paths[name] for name in names)}:
            self._remove(path)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """As MMEngine's, but what is replaced goes, and is forgotten, when the new is whole."""
        self._states = all_gather_object(self._before_val or random_state())
        limit, surplus = self.max_keep_ckpts, []
        if limit > 0:
            kept = [*self.keep_ckpt_ids]
            if kept[-1:] != [step]:  # the best one is written where this one has been
                kept.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', kept)
            surplus, self.keep_ckpt_ids = kept[:-limit], deque(kept[-limit:], limit)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._states = None
        if is_main_process():
            # An empty one, as a power cut leaves, could make an earlier run's files the last.
            write_whole(Path(runner.work_dir, 'last_checkpoint'), self.last_ckpt.encode())
        for old in surplus:
            self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))
        batches = getattr(runner.train_loop, 'dataloader_iterator', None)
        if isinstance(batches, _Batches):
            batches.begin(meta['iter'])

    def _remove(self, path: str) -> None:
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)


def find_whole_checkpoint(
    folder: str | Path, out_dir: str | Path | None = None
) -> tuple[str | None, list[str]]:
    """The checkpoint to resume from: the last one, or if that is damaged the one before it.

    Args:
        folder: The work folder of a run.
        out_dir: Where its checkpoints are. Defaults to None: in the work folder.

    Returns:
        tuple[str | None, list[str]]: Its path, None if there is none yet; and what to tell the user
        about files that were passed over.

    Raises:
        CheckpointError: If there are checkpoints, but none of this run that is whole.
        PermissionError: If the last one may not be read.
    """
    folders = [Path(path) for path in (out_dir, folder) if path is not None]
    last, note = Path(), Path(folder, 'last_checkpoint')
    with contextlib.suppress(OSError, UnicodeDecodeError):  # may itself be missing or damaged
        if note.is_file():  # no pipe, which one would wait for
            with note.open() as file:
                last = Path(file.read(MAX_PATH).strip())
    # A run that was copied must not go on from the one it was copied from.
    found = [own / last.name for own in folders]
    elsewhere = os.path.isfile(last) and not any(
        Path(os.path.realpath(last)).is_relative_to(os.path.realpath(own)) for own in folders
    )
    if not elsewhere:
        found.append(last)
    found += _latest_first([path for own in folders for path in own.glob('*.pth')], last)
    found = [path for path in found if os.path.isfile(path)]  # no name or link is too odd for it
    if elsewhere and not found:
        raise CheckpointError(
            f'{folder} has no checkpoint of its own, but last_checkpoint there names {last}. To go '
            f'on from that one, give --resume {last}; to start from the beginning, remove '
            f'{Path(folder) / "last_checkpoint"}'
        )
    damaged: dict[str, str] = {}
    no_runs = []
    for path in dict.fromkeys(path.resolve() for path in found):
        try:
            checkpoint = safe_load(path)
        except PermissionError:  # it may be whole: the user's to say
            raise
        except (CheckpointError, OSError) as error:
            damaged[str(path)] = str(error)
            continue
        if missing := _missing(checkpoint):  # the best one holds no optimizer
            no_runs.append(f'{path} lacks {", ".join(missing)}')
        else:
            return str(path), [f'{reason}; resuming from {path}.' for reason in damaged.values()]
    if damaged or no_runs:
        raise CheckpointError(
            f'no checkpoint in {folder} can be resumed from:\n'
            + ''.join(f'  {reason}\n' for reason in [*damaged.values(), *no_runs])
            + 'Move them away to start from the beginning, name another with --resume FILE, or '
            'start from weights with --cfg-options load_from=FILE in another --work-dir.'
        )
    return None, []


def _latest_first(paths: list[Path], last: Path) -> list[Path]:
    """Files in the order in which to try them: by number, as copying changes their time.

    Behind the number of the last one, files are of an earlier run in the same folder.
    """
    steps = {path: re.fullmatch(r'(epoch|iter)_(\d+)', path.stem) for path in [*paths, last]}
    comparable = len({step[1] for step in steps.values() if step}) == 1
    numbers = {path: int(step[2]) for path, step in steps.items() if step and comparable}

    def rank(path: Path) -> tuple[bool, int, float]:
        number = numbers.get(path, -1)
        return number <= numbers.get(last, number), number, os.path.getmtime(path)

    return sorted(filter(os.path.isfile, paths), key=rank, reverse=True)


def check_resumable(path: str | Path, checkpoint: Any) -> None:
    """Raise CheckpointError unless a loaded file holds the state of a training run.

    Args:
        path: Where it was loaded from.
        checkpoint: What it holds.
    """
    if missing := _missing(checkpoint):
        raise CheckpointError(
            f'{path} holds no training run to resume: it lacks {", ".join(missing)}. To '
            'start from its weights use --pretrained (the backbone) or --cfg-options load_from='
            f'{path} (the whole model)'
        )


def _missing(checkpoint: Any) -> list[str]:
    """What MMEngine needs to resume and a loaded file does not hold."""
    needed = {'meta', 'message_hub', 'optimizer', 'state_dict'}
    if not isinstance(checkpoint, dict):
        return sorted(needed)
    missing = sorted(name for name in needed if not isinstance(checkpoint.get(name), dict))
    if 'meta' not in missing:
        # Lists of lists would be written out in messages, which can take forever.
        meta = checkpoint['meta']
        for name in ('epoch', 'iter'):
            if type(meta.get(name)) is not int or not 0 <= meta[name] < 2**31:
                missing.append(f'a number as meta.{name}')
        if meta.get('seed') is not None and type(meta['seed']) is not int:
            missing.append('a number as meta.seed')
    return missing


def _check_state(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """Raise CheckpointError unless MMEngine can restore the state of a run from a loaded file.

    It would end in the middle, or restore part of it without a word, where the file is damaged, or
    of a run with another optimizer or schedule.
    """
    checks: list[tuple[str, Any, Callable]] = [('message_hub', runner.message_hub, _check_hub)]
    if isinstance(runner, Runner):  # a FlexibleRunner leaves these to its strategy
        names = {parameter: name for name, parameter in runner.model.named_parameters()}
        check_optimizer = partial(_check_optimizer_state, names=names)
        checks.append(('optimizer', runner.optim_wrapper, check_optimizer))
        checks.append(('param_schedulers', runner.param_schedulers, _check_schedulers))
    path = runner._load_from
    for name, own, check in checks:
        if own is None or (name not in checkpoint and name != 'message_hub'):
            continue  # MMEngine goes on without
        try:
            check(own, checkpoint.get(name))
        except Exception as error:  # it may hold anything
            raise CheckpointError(
                f'{path} cannot be resumed from: its {name} does not fit this run '
                f'({_reason(error)}). Resume with the settings it was trained with, or start from '
                f'its weights with --cfg-options load_from={path} in another --work-dir'
            ) from error


def _check_hub(own: MessageHub, saved: Any) -> None:
    scalars, info, resumed = (saved[key] for key in ('log_scalars', 'runtime_info', 'resumed_keys'))
    for part in (scalars, info, resumed):
        if not isinstance(part, dict) or not all(type(name) is str for name in part):
            raise TypeError('values without names')
    if any(map(controls_terminal, scalars)):  # which are logged
        raise ValueError('names with characters that terminals obey')
    for name, buffer in scalars.items():
        if isinstance(buffer, HistoryBuffer):  # others are left out
            buffer.current()  # an empty one has none
        if resumed.get(name, True) is not True:  # MMEngine would stop when it next logs this
            raise ValueError('a value that it holds and that is not to be resumed')
    for name, value in info.items():
        if name.startswith('best_score') and not _alike(0.0, value):
            raise TypeError('a best_score that is no number')


def _check_optimizer_state(
    own: OptimWrapper | OptimWrapperDict, saved: Any, names: dict[nn.Parameter, str]
) -> None:
    if isinstance(own, OptimWrapperDict) and {*own.keys()} != {*saved}:
        raise KeyError(f'optimizers {[*own.keys()]} here')
    wrappers = [*own.values()] if isinstance(own, OptimWrapperDict) else [own]
    defaults = [dict(wrapper.optimizer.defaults) for wrapper in wrappers]  # torch adds one below
    own.load_state_dict(saved)  # MMEngine will do so again
    for wrapper, settings in zip(wrappers, defaults, strict=True):
        optimizer, base = wrapper.optimizer, wrapper.base_param_settings
        # What this torch knows and an older one did not, it has just filled in.
        if not all(_alike(settings, group) for group in optimizer.param_groups):
            raise ValueError(f'it is not of {type(optimizer).__name__}')
        if not all(isinstance(state, dict) for state in optimizer.state.values()):
            raise TypeError('the state of a parameter is no dictionary')
        for parameter, state, example in _with_examples(optimizer):
            name = names.get(parameter, 'a parameter').removeprefix('module.')
            for key, value in example.items():
                if isinstance(optimizer, SGD) and state.get(key) is None:
                    continue  # it begins anew
                if problem := _unlike(key, value, state.get(key)):
                    raise ValueError(f'{key} of {name} is {problem}')
        if base is not None and not _alike(dict(lr=0.0), base):
            raise TypeError('its base_param_settings have no learning rate')


def _with_examples(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, dict, dict]]:
    """Parameters, their states as restored, and states that the optimizer makes by itself.

    Those of LBFGS and of others than torch's own may have states of any shape.
    """
    kind = type(optimizer)
    if not kind.__module__.startswith('torch.optim') or kind in (LBFGS, SparseAdam):
        return
    for group in optimizer.param_groups:
        # What belongs to devices that a copy is not on; it changes no shape.
        plain = {key: False for key in ('foreach', 'fused', 'capturable') if key in group}
        examples: dict[tuple, dict] = {}
        for parameter in group['params']:
            if not optimizer.state.get(parameter):
                continue
            key = parameter.shape, parameter.dtype
            if key not in examples:
                twin = torch.zeros(parameter.shape, dtype=parameter.dtype)
                twin.grad = torch.zeros_like(twin)
                try:
                    own = kind([{**group, **plain, 'params': [twin]}], lr=0.0)
                    own.step()
                except Exception:  # of settings that live on another device, say
                    return
                examples[key] = own.state[twin]
            yield parameter, optimizer.state[parameter], examples[key]


def _unlike(key: str, own: Any, saved: Any) -> str | None:
    """What is wrong with a value of an optimizer's state beside one that it makes by itself."""
    if not isinstance(own, torch.Tensor):
        return None
    if not isinstance(saved, torch.Tensor):
        return f'no tensor, but a {type(saved).__name__}'
    if key in COUNTERS and not own.ndim:
        counts = saved.numel() == 1 and 0 <= float(saved) < float('inf')
        return None if counts else 'no number from 0'
    if own.shape != saved.shape:
        return f'{tuple(saved.shape)} instead of {tuple(own.shape)}'
    return None


def _check_schedulers(own: list | dict[str, list], saved: Any) -> None:
    if isinstance(own, dict):
        states: Any = {name: [x.state_dict() for x in items] for name, items in own.items()}
    else:
        states = [x.state_dict() for x in own]
    # MMEngine takes as many as there are, and whatever is in them.
    if not (_alike(states, saved) and _alike(saved, states)):
        raise ValueError('schedulers of another number or kind')


def _alike(own: Any, saved: Any) -> bool:
    """Whether a saved value is built like one of this run, and has at least its keys."""
    if type(own) is dict:
        return (
            isinstance(saved, dict)
            and own.keys() <= saved.keys()
            and all(_alike(value, saved[key]) for key, value in own.items())
        )
    if isinstance(own, (list, tuple)):
        return (
            isinstance(saved, (list, tuple))
            and len(own) == len(saved)
            and all(map(_alike, own, saved))
        )
    if own is None or isinstance(own, (int, float)):
        if isinstance(saved, torch.Tensor):
            return saved.numel() == 1
        return saved is None or isinstance(saved, (int, float, np.number))
    return type(saved) is type(own)


def _reason(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error)[:200]}'


def _check_same_point(runner: Runner) -> None:
    """Raise CheckpointError if processes are to go on from different checkpoints.

    As where each node has a disk of its own, and only the first one's holds any: the others would
    start anew, with weights of their own, and wait for the first at the end.
    """
    iterations = all_gather_object(runner.iter)
    if len({*iterations}) > 1:
        raise CheckpointError(
            'the processes are not at the same point: at iterations '
            f'{", ".join(map(str, iterations))}. They must find the same checkpoint: let the nodes '
            'share the work folder, or copy it from the first node to the others'
        )


def _warn_if_finished(runner: Runner) -> None:
    if isinstance(runner.train_loop, IterBasedTrainLoop):
        unit, done, end = 'iter', runner.iter, runner.max_iters
    else:
        unit, done, end = 'epoch', runner.epoch, runner.max_epochs
    if done >= end:
        runner.logger.warning(
            f'The checkpoint is at {unit} {done} of {end}: nothing is left to train; raise '
            f'train_cfg.max_{unit}s to go on.'
        )


def _settings(runner: Runner) -> dict[str, list]:
    """What optimizers and schedulers are set to, by name; not what changes as they go."""
    found: dict[str, list] = {}
    if not isinstance(runner, Runner):  # a FlexibleRunner leaves these to its strategy
        return found
    wrappers, schedulers = runner.optim_wrapper, runner.param_schedulers or []
    wrappers = [*wrappers.values()] if isinstance(wrappers, OptimWrapperDict) else [wrappers]
    if isinstance(schedulers, dict):
        schedulers = [scheduler for several in schedulers.values() for scheduler in several]
    for group in (group for wrapper in wrappers for group in wrapper.optimizer.param_groups):
        for key, value in group.items():
            if key != 'params' and f'initial_{key}' not in group:
                found.setdefault(key, []).append(value)
    for scheduler in schedulers:
        for key, value in scheduler.state_dict().items():
            if not (key.startswith(('_', 'last_')) or key in PROGRESS):
                found.setdefault(f'{type(scheduler).__name__}.{key}', []).append(value)
    return found


def _warn_of_settings(runner: Runner, configured: dict[str, list]) -> None:
    """Say which settings of the config do nothing, as MMEngine has restored the checkpoint's."""
    told = []
    for name, values in _settings(runner).items():
        pairs = zip(configured.get(name, []), values, strict=False)
        for own, restored in pairs:
            if own != restored:
                told.append(f'{name}={_number(restored)} instead of {_number(own)}')
                break
    if told:
        more = f' and {len(told) - 6} more' if len(told) > 6 else ''
        runner.logger.warning(
            'Of the optimizer and the schedulers the settings of the checkpoint hold, not those of '
            f'the config: {", ".join(told[:6])}{more}. (They count iterations, so that another '
            'batch size or number of processes, or more data, changes them too.) To train with '
            'those of the config, start from its weights with --cfg-options '
            f'load_from={runner._load_from} in another --work-dir.'
        )


def _number(value: Any) -> str:
    """A setting for a message; it may come from a file, and be anything."""
    if isinstance(value, (list, tuple)):
        return f'({", ".join(map(_number, value[:4]))})'
    plain = isinstance(value, (float, type(None))) or (type(value) is int and abs(value) < 2**63)
    return str(value) if plain or isinstance(value, bool) else 'another'


def random_state() -> dict[str, Any]:
    """The state of this process's random number generators, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state()
    state = dict(
        python=random.getstate(), numpy=(kind, keys.tolist(), *rest), torch=torch.get_rng_state()
    )
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set the random number generators to a state of :func:`random_state`."""
    random.setstate(state['python'])
    kind, keys, position, *gauss = state['numpy']
    if kind != 'MT19937' or len(keys) != 624 or not 0 <= position <= 624:
        # numpy takes any position, and reads beyond its memory.
        raise CheckpointError('the state of numpy in random_state is none: the file is damaged')
    np.random.set_state((kind, keys, position, *gauss))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def sampler_of(loader: DataLoader) -> Any:
    """The sampler of a data loader; one with a batch sampler hides it there."""
    batch_sampler = getattr(loader, 'batch_sampler', None)
    return getattr(batch_sampler, 'sampler', None) or loader.sampler


def _can_skip(loader: DataLoader) -> bool:
    """Whether the order of the data is MMEngine's InfiniteSampler's, batch by batch."""
    return type(loader.batch_sampler) is BatchSampler and hasattr(
        loader.sampler, '_indices_of_rank'
    )


def _seed_workers(loader: DataLoader, runner: Runner) -> None:
    loader.worker_init_fn = partial(_seed_worker, seed=(runner.seed, runner.iter, runner.rank))
    loader._iterator = None  # ends persistent workers: only new ones take a seed


def _seed_worker(worker: int, seed: tuple[int, ...]) -> None:
    words = np.random.SeedSequence([*seed, worker]).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])


class _Batches:
    """The endless iterator of iteration-based training, which can begin at any iteration."""

    def __init__(self, loader: DataLoader, runner: Runner) -> None:
        self.loader, self.runner = loader, runner
        # The originals ask one by one for what is to be skipped, OneDL's by skip_iter.
        by_one = not hasattr(_InfiniteDataloaderIterator, 'skip_iter')
        self.skipped = runner.iter if by_one else 0
        self.begin(runner.iter)

    def begin(self, iteration: int) -> None:
        """Go on at an iteration, with new workers."""
        sampler = self.loader.sampler
        start = iteration * self.loader.batch_size
        sampler.indices = itertools.islice(sampler._indices_of_rank(), start, None)
        self.iterator: Iterator | None = None

    def skip_iter(self, count: int) -> None:
        """Nothing is left to do."""

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self.skipped:
            self.skipped -= 1
            return None
        if self.iterator is None:
            _seed_workers(self.loader, self.runner)
            self.iterator = iter(self.loader)
        return next(self.iterator)
