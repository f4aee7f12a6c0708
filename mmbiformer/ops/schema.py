"""The fused attention as operators that ``torch.compile`` and ``torch.export`` know.

Shapes and gradients are declared here, for all backends with kernels of their own. A backend's
``launch`` module runs them. It is imported when an operator first runs, and Triton with it. A plain
eager call goes past the operators: ``torch.library`` adds more time to a call than a kernel takes.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .settings import Settings
from .tracing import eager


def attend(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, settings: Settings, backend: str
) -> Tensor:
    """See :func:`mmbiformer.ops.routed_attention`; the backend is one with a ``launch`` module."""
    if eager() and type(query) is Tensor:  # subclasses may hold no data
        return _FusedAttention.apply(query, key, value, routes, settings, backend)
    return fused_attention(query, key, value, routes, *settings, backend)[0]


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        output = _forward(*args)
        _setup_context(ctx, args, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:  # nothing that follows has a gradient
            return (None,) * 6
        return *_backward(grad_out, *ctx.saved_tensors, *ctx.others), None, None, None


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *args, backend = args
    with unfilled_memory():
        return _launch(backend).forward(*args)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *args, backend = args
    with unfilled_memory():
        return _launch(backend).backward(*args)


def _launch(backend: str) -> ModuleType:
    return import_module(f'.backends.{backend}.launch', __package__)


# Calls come from several threads, but the setting is the process's: the last call restores it.
_lock, _callers, _filled = threading.Lock(), 0, True


@contextlib.contextmanager
def unfilled_memory() -> Iterator[None]:
    """Leave new tensors as they are in deterministic mode, where PyTorch fills them with NaN.

    The kernels write every element that they return. Filling them first would double that cost.
    """
    global _callers, _filled
    setting = torch.utils.deterministic
    with _lock:
        if not _callers:
            _filled, setting.fill_uninitialized_memory = setting.fill_uninitialized_memory, False
        _callers += 1
    try:
        yield
    finally:
        with _lock:
            _callers -= 1
            if not _callers:
                setting.fill_uninitialized_memory = _filled


# The signatures of operators cannot hold a NamedTuple, so here the settings are spelt out.


@torch.library.custom_op('mmbiformer::fused_attention', mutates_args=())
def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_heads: int,
    region_size: Sequence[int],
    key_region_size: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Wq, Cv), contiguous, and what the backward pass needs of the softmax.

    These are, in float32, each row's largest logit and one over its sum of exponentials,
    (B, heads, 2, Hq * Wq).
    """
    settings = Settings(num_heads, tuple(region_size), tuple(key_region_size), scale)
    return _forward(query, key, value, routes, settings, backend)


@fused_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, num_heads: int, *others: Any
) -> tuple[Tensor, Tensor]:
    batch, height, width, _ = query.shape
    out = query.new_empty(batch, height, width, value.shape[3])
    return out, query.new_empty(batch, num_heads, 2, height * width, dtype=torch.float32)


@torch.library.custom_op('mmbiformer::fused_attention_backward', mutates_args=())
def fused_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    out: Tensor,
    stats: Tensor,
    num_heads: int,
    region_size: Sequence[int],
    key_region_size: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    settings = Settings(num_heads, tuple(region_size), tuple(key_region_size), scale)
    return _backward(grad_out, query, key, value, routes, out, stats, settings, backend)


@fused_attention_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.others = inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_stats: None
) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    return (*fused_attention_backward(grad_out, *ctx.saved_tensors, *ctx.others), *(None,) * 6)


fused_attention.register_autograd(_differentiate, setup_context=_setup_context)
