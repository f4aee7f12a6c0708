"""Checkpoints of a run that may be killed at any moment and resumes exactly."""

import contextlib
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from torch.distributed.fsdp import FullyShardedDataParallel

from ...files import PARTIAL, write_whole
from ...models.base import Backbone
from ...registry import HOOKS
from ...weights.fit import check_backbones, check_fit
from .data_order import EndlessBatches, can_begin_anywhere, sampler_of, seed_workers
from .random_state import random_state, set_random_state
from .resume import check_resumable, check_same_point, warn_if_finished
from .run_state import (
    accumulated_gradients,
    broadcast_buffers,
    early_stopping,
    is_validation_due,
    set_early_stopping,
    set_gradients,
)


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


class _LateRemovals(AtomicBackend):
    """Removes files later: MMEngine removes an old checkpoint before it writes the new one."""

    def __init__(self) -> None:
        self.surplus: list[str] = []

    def remove(self, filepath: str | Path) -> None:
        self.surplus.append(str(filepath))

    def remove_surplus(self) -> None:
        while self.surplus:
            super().remove(self.surplus.pop())


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """MMEngine's ``CheckpointHook``, made so that a killed run resumes bit for bit.

    - A checkpoint is written under another name and renamed, and only then older ones are removed:
      at any moment there is a whole last one and a whole best one.
    - It holds the random state of each process and the seed of the sampler. Validation may draw
      random numbers; afterwards the state is as it was before.
    - It is written before the validation of its iteration and again after it, with what schedules
      and hooks have learnt. A run that was killed in between validates first when it is resumed.
    - It holds the state of ``EarlyStoppingHook``, and gradients that are being accumulated.
    - Before a validation and a checkpoint, all processes take over the buffers of the first, such
      as the running averages of BatchNorm: what is validated is what the checkpoint holds.
    - Workers of the data loader get new seeds, from the run's seed and the iteration, wherever a
      run may resume: at every epoch, or in iteration-based training after every checkpoint. There
      the data go on at the iteration's place in the sampler's order.

    A checkpoint that is resumed or tested must hold the whole model around a backbone of this
    project; one that a training starts from (``load_from``) must hold the backbone. MMEngine would
    only log what does not fit.

    Resumed with the same number of processes, a run equals one that was not killed as far as the
    device's kernels are deterministic. Exceptions are checkpoints within an epoch, which MMEngine
    begins anew, and gradients that several optimizers accumulate.

    The arguments are those of MMEngine's hook.

    Raises:
        CheckpointError: If a checkpoint does not fit, or processes resume at different points.
        WriteError: If a checkpoint cannot be written.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states: list[dict] | None = None  # of all processes, while a checkpoint is written
        self._gradients: list[dict] | None = None
        self._before_val: dict | None = None
        self._saved = dict(epoch=-1, iter=-1)  # where the last checkpoint is
        self._validated_at = -1  # iteration
        self._better = False  # whether this validation has found a best checkpoint
        self._resumed: dict = {}
        self._configured: list[float] = []  # learning rates, before the checkpoint's

    def before_train(self, runner: Runner) -> None:
        """Take over the writing of local files and the order of the data; restore what resumed."""
        check_same_point(runner)
        super().before_train(runner)
        self._forget_foreign_best()
        if type(self.file_backend) is LocalBackend:
            self.file_backend = _LateRemovals()
            self.backend_args = dict(backend='AtomicBackend')
            if is_main_process():  # a killed run may leave a half-written file
                for path in Path(self.out_dir).glob(f'.*.pth{PARTIAL}'):
                    with contextlib.suppress(OSError):
                        path.unlink()
        if runner._resume:
            warn_if_finished(runner)
            self._warn_of_learning_rate(runner)
        state, self._resumed = self._resumed, {}
        if state:
            self._restore(runner, state)
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop) and can_begin_anywhere(loop.dataloader):
            loop.dataloader_iterator = EndlessBatches(loop.dataloader, runner)
        if not state.get('validated', True) and is_validation_due(runner):
            runner.logger.info('Validating first: the run was killed before it had done so.')
            self._saved = dict(epoch=runner.epoch, iter=runner.iter)
            runner.val_loop.run()

    def before_train_epoch(self, runner: Runner) -> None:
        """Let each epoch begin with newly seeded workers."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            seed_workers(runner.train_loop.dataloader, runner)

    def before_val(self, runner: Runner) -> None:
        """Remember the random state, as a resumed run does not validate again."""
        self._before_val = random_state()
        broadcast_buffers(runner.model)

    def before_val_epoch(self, runner: Runner) -> None:
        """Validate with the buffers of the first process also where averages were swapped in."""
        broadcast_buffers(runner.model)

    def after_val(self, runner: Runner) -> None:
        """Go on as if validation had drawn no random numbers; save what was learnt from it."""
        set_random_state(self._before_val)
        self._before_val, better, self._better = None, self._better, False
        self._validated_at = runner.iter
        if better or self._saved['iter'] == runner.iter:
            step = runner.epoch if self.by_epoch else runner.iter
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            self._save_checkpoint_with_step(runner, step, meta)
        self._remove_surplus()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add what a resumed run needs beside MMEngine's own."""
        if self._states is not None:
            checkpoint['meta'].update(self._saved)  # a FlexibleRunner assumes a step too many
            checkpoint['random_state'] = dict(
                ranks=self._states,
                sampler_seed=getattr(sampler_of(runner.train_loop.dataloader), 'seed', None),
            )
            checkpoint['run_state'] = dict(
                validated=self._saved['iter'] == self._validated_at,
                early_stopping=early_stopping(runner),
                gradients=self._gradients,
            )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check whether the checkpoint fits, before MMEngine loads what does; keep the rest."""
        # A FlexibleRunner's strategy, and sharding, give weights other names.
        if isinstance(runner, Runner) and not isinstance(runner.model, FullyShardedDataParallel):
            path = runner._load_from or 'the last checkpoint'
            if runner._resume:
                check_resumable(path, checkpoint)
                self._configured = _learning_rates(runner)
            if isinstance(runner._train_loop, BaseLoop) and not runner._resume:
                check_backbones(runner.model, checkpoint, path)
            elif any(isinstance(part, Backbone) for part in runner.model.modules()):
                check_fit(runner.model, checkpoint, path)
        if runner._resume:
            parts = (checkpoint.get(name) for name in ('random_state', 'run_state'))
            self._resumed = {key: value for part in parts for key, value in (part or {}).items()}

    def _forget_foreign_best(self) -> None:
        """Take the best checkpoint for this run's own only if it is in this run's folder.

        MMEngine removes the best checkpoint when there is a better one. A run that resumes in
        another folder would remove that of the original run.
        """

        def own(path: str | None) -> str | None:
            name = Path(path or '').name
            path = self.file_backend.join_path(self.out_dir, name)
            return path if name.startswith('best_') and self.file_backend.isfile(path) else None

        if hasattr(self, 'best_ckpt_path'):
            self.best_ckpt_path = own(self.best_ckpt_path)
        for name, path in getattr(self, 'best_ckpt_path_dict', {}).items():
            self.best_ckpt_path_dict[name] = own(path)

    def _warn_of_learning_rate(self, runner: Runner) -> None:
        """Warn if the config's learning rate has no effect, as MMEngine restores the old one."""
        pairs = zip(self._configured, _learning_rates(runner), strict=False)
        if changed := [pair for pair in pairs if pair[0] != pair[1]]:
            runner.logger.warning(
                "The checkpoint's learning rate {1:g} holds, not {0:g} of the config, and so do "
                'its schedules. To train with the config, start from the weights with '.format(
                    *changed[0]
                )
                + f'--cfg-options load_from={runner._load_from} in another --work-dir.'
            )

    def _restore(self, runner: Runner, saved: dict) -> None:
        if 'early_stopping' in saved:
            set_early_stopping(runner, saved['early_stopping'])
        sampler = sampler_of(runner.train_loop.dataloader)
        if saved['sampler_seed'] is not None and hasattr(sampler, 'seed'):
            sampler.seed = saved['sampler_seed']
        if len(saved['ranks']) == runner.world_size:
            set_random_state(saved['ranks'][get_rank()])
            if saved.get('gradients'):
                set_gradients(runner, saved['gradients'][get_rank()])
                runner.logger.info('The gradients accumulated so far are restored.')
        else:
            runner.logger.warning(
                f'The checkpoint is of {len(saved["ranks"])} processes, this run has '
                f'{runner.world_size}: random numbers and the order of the data will differ.'
            )

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        if self._before_val is not None:  # MMEngine's hook notes the new best one
            self._better = True  # after_val saves, when all hooks have learnt from the validation
            return
        broadcast_buffers(runner.model)
        self._saved = dict(meta)
        self._states = all_gather_object(random_state())
        gradients = accumulated_gradients(runner)
        self._gradients = gradients and all_gather_object(gradients)
        super()._save_checkpoint_with_step(runner, step, meta)
        self._states = self._gradients = None
        if is_main_process():  # MMEngine does not wait for the disk; a power cut could empty it
            write_whole(Path(runner.work_dir, 'last_checkpoint'), self.last_ckpt.encode())
        self._remove_surplus()
        batches = getattr(runner.train_loop, 'dataloader_iterator', None)
        if isinstance(batches, EndlessBatches):
            batches.begin(self._saved['iter'])

    def _remove_surplus(self) -> None:
        backend = getattr(self, 'file_backend', None)  # only a training has one
        if isinstance(backend, _LateRemovals):
            backend.remove_surplus()


def _learning_rates(runner: Runner) -> list[float]:
    """Give the learning rates that schedules begin with; none for several optimizers."""
    if not isinstance(runner.optim_wrapper, OptimWrapper):
        return []
    return [group.get('initial_lr', group['lr']) for group in runner.optim_wrapper.param_groups]
