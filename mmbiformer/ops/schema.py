"""The fused attention as operators that ``torch.compile`` and ``torch.export`` know.

Shapes and gradients are declared here; the kernels, and with them Triton, are imported when an
operator first runs. Where nothing but its result is wanted, a call passes the operators by: what
``torch.library`` does around each takes longer than a kernel.
"""

from typing import Any, Sequence  # noqa: UP035 (torch 2.5 takes no other Sequence)

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .regions import eager


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_heads: int,
    region_size: tuple[int, int],
    key_region_size: tuple[int, int],
    scale: float,
) -> Tensor:
    """See :func:`mmbiformer.ops.routed_attention`."""
    args = query, key, value, routes, num_heads, region_size, key_region_size, scale
    if eager() and type(query) is Tensor:  # subclasses may hold no data
        return _FusedAttention.apply(*args)
    return fused_attention(*args)[0]


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        from .backends.triton import launch

        output = launch.forward(*args)
        _setup_context(ctx, args, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        from .backends.triton import launch

        return (*launch.backward(grad_out, *_kept(ctx)), *(None,) * 5)


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
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Wq, Cv), and what the backward pass needs of the softmax."""
    from .backends.triton import launch

    return launch.forward(query, key, value, routes, num_heads, region_size, key_region_size, scale)


@fused_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_heads: int,
    region_size: Sequence[int],
    key_region_size: Sequence[int],
    scale: float,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    from .backends.triton import launch

    return launch.backward(
        grad_out,
        query,
        key,
        value,
        routes,
        out,
        stats,
        num_heads,
        region_size,
        key_region_size,
        scale,
    )


@fused_attention_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.num_heads, ctx.region_size, ctx.key_region_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _kept(ctx: Any) -> tuple[Any, ...]:
    return *ctx.saved_tensors, ctx.num_heads, ctx.region_size, ctx.key_region_size, ctx.scale


def _backward(ctx: Any, grad_out: Tensor, grad_stats: None) -> tuple[Tensor | None, ...]:
    return (*fused_attention_backward(grad_out, *_kept(ctx)), *(None,) * 5)


fused_attention.register_autograd(_backward, setup_context=_setup_context)
