"""The choice of a backend, for every operator that has several."""

import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def choose(backends: Mapping[str, ModuleType], name: str, *args: Any) -> ModuleType:
    """Choose the backend that runs a call.

    Args:
        backends: Backends by name, the preferred one first. Their ``why_not(*args)`` gives the
            reason why they cannot run these arguments, or None.
        name: A name, or ``'auto'`` for the first that can run.
        *args: Tensors and number of heads.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If the named backend cannot run these arguments.
    """
    if name == 'auto':
        for candidate, backend in backends.items():
            reason = backend.why_not(*args)
            if reason is None:
                return backend
            if not torch.compiler.is_compiling():  # a log call would break the graph
                logger.debug('attention does not use %r: %s', candidate, reason)
    check_name(backends, name)
    reason = backends[name].why_not(*args)
    if reason is not None:
        raise RuntimeError(f'backend={name!r} cannot run here: {reason}')
    return backends[name]


def check_name(backends: Mapping[str, ModuleType], name: str) -> None:
    """Raise ValueError unless a backend has this name, or it is ``'auto'``."""
    if name not in ('auto', *backends):
        raise ValueError(f'backend={name!r} is unknown; choose one of {["auto", *backends]}')


def as_number(scale: float | Tensor | None, channels: int, num_heads: int) -> float:
    """The factor on the logits as a number; (C / num_heads) ** -0.5 for None.

    Raises ValueError if it is a tensor that wants a gradient.
    """
    if isinstance(scale, Tensor):
        if scale.requires_grad:
            raise ValueError(
                'scale must be a number: most backends give it no gradient; multiply the query by '
                'it, and give scale=1'
            )
        return float(scale)
    return (channels // num_heads) ** -0.5 if scale is None else scale
