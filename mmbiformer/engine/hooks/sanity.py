"""A sanity run before training."""

import copy
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, ValLoop
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ...registry import HOOKS
from .random_state import random_state, set_random_state

VAL_BATCHES = 2


@HOOKS.register_module()
class SanityRunHook(Hook):
    """Try one training batch and two validation batches before training.

    A mistake in the validation then shows at the start, not after the first epoch. The training
    batch goes forward and backward through a copy of the model, without an optimizer step. The
    validation batches go through the copy and the ``process`` method of the metrics.

    Nothing of it is left: batches are drawn in a worker process that ends with the hook, and the
    random state is put back, so that weights and logs are the same as without it. It needs memory
    for a second copy of the weights. Whatever fails keeps its traceback.

    Models that cannot be copied, such as sharded ones, and loops, loaders and runners other than
    MMEngine's own are left alone.
    """

    priority = 'LOWEST'  # after hooks that prepare the model

    def before_train(self, runner: Runner) -> None:
        """Run it; the run has loaded its weights by now."""
        if type(runner.train_loop) not in (EpochBasedTrainLoop, IterBasedTrainLoop):
            return
        model = _copied(runner)
        if model is None:
            runner.logger.info('The sanity run is left out: the model cannot be copied.')
            return
        state = random_state()
        try:
            _try_training(model, runner)
            if type(runner.val_loop) is ValLoop:
                _try_validation(model, runner.val_loop)
        finally:
            set_random_state(state)


def _copied(runner: Runner) -> nn.Module | None:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    try:
        # Hooks on layers may hold the runner, which is not copied.
        return copy.deepcopy(model, {id(runner): runner})
    except Exception:  # anything may stand in the way inside a user's model
        return None


def _try_training(model: nn.Module, runner: Runner) -> None:
    model.train()
    for batch in _first_batches(runner.train_dataloader, 1):
        # The method of the class: the instance may have a compiled one, which is bound to the
        # original model.
        type(model).train_step(model, batch, optim_wrapper=_Dry(runner.optim_wrapper))
    model.zero_grad()


def _try_validation(model: nn.Module, loop: ValLoop) -> None:
    trial = copy.copy(loop)
    trial._runner = SimpleNamespace(model=model, call_hook=lambda *args, **kwargs: None)
    trial.val_loss = {}
    model.eval()
    try:
        for i, batch in enumerate(_first_batches(loop.dataloader, VAL_BATCHES)):
            trial.run_iter(i, batch)
    finally:
        for metric in loop.evaluator.metrics:
            metric.results.clear()


def _first_batches(loader: Any, count: int) -> Iterator[Any]:
    """Draw the first batches of a data loader in a process of their own.

    Samplers and data sets may change as they are read; here they change in a forked process only.
    """
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        return iter(())
    return iter(
        DataLoader(
            _Batches(loader, count),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=1,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context='fork',
        )
    )


def _as_it_is(batch: Any) -> Any:
    return batch


class _Batches(IterableDataset):
    def __init__(self, loader: DataLoader, count: int) -> None:
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[Any]:
        dataset, collate = self.loader.dataset, self.loader.collate_fn
        for indices in itertools.islice(self.loader.batch_sampler, self.count):
            yield collate([dataset[i] for i in indices])


class _Dry:
    """An optimizer wrapper, or a dict of several, that computes gradients and changes nothing."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def __getitem__(self, name: str) -> '_Dry':
        return _Dry(self._wrapper[name])

    def update_params(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        loss.backward(**kwargs)

    def step(self, **kwargs: Any) -> None:
        pass

    def zero_grad(self, **kwargs: Any) -> None:
        pass
