"""Find the layer in which a NaN appears."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from ...errors import UserError
from ...registry import HOOKS


class NotFiniteError(UserError, ArithmeticError):
    """A layer met or made numbers that are not finite; the message names the layer."""


@HOOKS.register_module()
class CheckFiniteHook(Hook):
    """Stop training at the first layer whose input, parameters or output hold NaN or infinity.

    The hook looks at the output of every layer in every iteration, which takes time. Switch it on
    to find out where a NaN comes from: ``custom_hooks = [dict(type='mmbiformer.CheckFiniteHook')]``

    Raises:
        NotFiniteError: While training, with the layer's name and the iteration.
    """

    def before_train(self, runner: Runner) -> None:
        """Watch all layers; PyTorch calls a layer's hook before that of the layer around it."""
        for name, module in runner.model.named_modules():
            module.register_forward_hook(_Watch(name or type(module).__name__, runner))


class _Watch:
    def __init__(self, name: str, runner: Runner) -> None:
        self.name = name
        self.runner = runner

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training or _is_finite(output):
            return
        parameters = [
            name for name, value in module.named_parameters(recurse=False) if not _is_finite(value)
        ]
        if not _is_finite(args):
            where = f'the input of {self.name} is not finite, and no layer before it made it so'
        elif parameters:
            where = (
                f'{" and ".join(parameters)} of {self.name} is not finite since the update before '
                'this iteration'
            )
        else:
            where = f'the output of {self.name} is not finite, though its input is'
        raise NotFiniteError(
            f'iteration {self.runner.iter + 1}: {where}. Look at the data of this iteration, or '
            'lower the learning rate, clip gradients (optim_wrapper.clip_grad), or train in '
            'float32 or bfloat16'
        )


def _is_finite(values: Any) -> bool:
    """Say whether all floating-point tensors in nested containers are finite."""
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return True
    return all(_is_finite(value) for value in values)
