"""The state of a run beside the weights, optimizer and schedules that MMEngine saves."""

from typing import Any

from mmengine.dist import broadcast
from mmengine.hooks import EarlyStoppingHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import Tensor, nn

LEARNT = 'wait_count', 'best_score'
"""Attributes that an EarlyStoppingHook learns."""
CHOSEN = 'monitor', 'rule', 'min_delta', 'patience', 'stopping_threshold'
"""Arguments that decide when it stops the training."""


def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first, whose checkpoint has them.

    MMEngine lets each process keep the running averages of its own images. The authors' training
    of classifiers broadcasts them at each forward pass, as is PyTorch's default, and that of
    detectors and segmentors before each validation, by MMCV's ``DistEvalHook``. Gradients do not
    depend on running averages, so the weights are the same.

    Args:
        model: The model, or a wrapper of it; changed in place.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Caches that are not saved may have another size in each process.
            if name not in module._non_persistent_buffers_set:
                broadcast(buffer)


def accumulated_gradients(runner: Runner) -> dict[str, Tensor] | None:
    """Give the gradients of this process between two steps of the optimizer.

    Args:
        runner: The run.

    Returns:
        dict[str, Tensor] | None: By name, on the CPU; or None if no accumulation is under way, and
        for several optimizers, which MMEngine does not count.
    """
    wrapper = runner.optim_wrapper
    known = isinstance(wrapper, OptimWrapper) and not isinstance(wrapper, OptimWrapperDict)
    if not known or wrapper.should_update():
        return None
    return {
        name: value.grad.cpu()
        for name, value in runner.model.named_parameters()
        if value.grad is not None
    }


def set_gradients(runner: Runner, gradients: dict[str, Tensor]) -> None:
    """Go on with gradients of :func:`accumulated_gradients`.

    Args:
        runner: The run.
        gradients: Gradients by name.
    """
    for name, value in runner.model.named_parameters():
        if name in gradients:
            value.grad = gradients[name].to(value.device)


def early_stopping(runner: Runner) -> dict[str, Any]:
    """Read what the run's ``EarlyStoppingHook`` objects have learnt.

    Args:
        runner: The run.
    """
    hooks = [
        {name: getattr(hook, name) for name in (*LEARNT, *CHOSEN)}
        for hook in runner.hooks
        if isinstance(hook, EarlyStoppingHook)
    ]
    return dict(hooks=hooks, stopped=getattr(runner.train_loop, 'stop_training', False))


def set_early_stopping(runner: Runner, state: dict[str, Any]) -> None:
    """Go on with a state of :func:`early_stopping`.

    A run that was stopped stays so, unless the hook now has other arguments.

    Args:
        runner: The run.
        state: The state.
    """
    hooks = [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]
    for hook, saved in zip(hooks, state['hooks'], strict=False):
        for name in LEARNT:
            setattr(hook, name, saved[name])
        same = all(getattr(hook, name) == saved[name] for name in CHOSEN)
        if state['stopped'] and same:
            runner.train_loop.stop_training = True
            runner.logger.warning(
                'EarlyStoppingHook ended the resumed run: nothing is left to train. To go on, '
                'raise its patience or leave it out.'
            )


def is_validation_due(runner: Runner) -> bool:
    """Say whether MMEngine's loop would validate at this point of the training.

    Args:
        runner: The run, before it goes on.
    """
    loop = runner.train_loop
    if runner.val_loop is None or not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
        return False
    if isinstance(loop, IterBasedTrainLoop):
        now, end = loop.iter, loop.max_iters
    elif loop.iter == loop.epoch * len(loop.dataloader):
        now, end = loop.epoch, loop.max_epochs
    else:
        return False  # within an epoch
    loop._decide_current_val_interval()
    return now >= max(loop.val_begin, 1) and (now % loop.val_interval == 0 or now == end)
