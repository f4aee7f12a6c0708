"""Bi-directional cross-attention in fused C++, for CPUs; importing this compiles nothing.

One pass over the tokens serves both directions: a tile of scores is computed once, read along both
axes and forgotten. The backward pass computes it again.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from ..backends.cpp.library import load, why_no_library
from ..schema import unfilled_memory
from ..tracing import eager, exporting

LANES = 8  # floats that bidirectional.cpp reads at a time


def why_not(
    latent_r: Tensor, latent_v: Tensor, token_r: Tensor, token_v: Tensor, num_heads: int
) -> str | None:
    """Why these tensors cannot be run, or None."""
    tensors = latent_r, latent_v, token_r, token_v
    for x in tensors:
        if x.device.type != 'cpu':
            return f'tensors are on {x.device.type}, and it is made for CPUs'
        if x.dtype != torch.float32:
            return f'a tensor is {x.dtype}; it takes torch.float32'
        if x.shape[2] // num_heads % LANES:
            return f'heads of {x.shape[2] // num_heads} channels; it takes multiples of {LANES}'
    if exporting():
        return 'an exported graph must run without this project'
    compiling = torch.compiler.is_compiling()
    if not (compiling or eager()) or any(type(x) not in (Tensor, Parameter) for x in tensors):
        return 'a tracer, transform or subclass of tensors must see each operation'
    return why_no_library()


def attend(*args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`mmbiformer.ops.bidirectional_attention`."""
    # torch.library adds more time to an eager call than a small kernel takes.
    return _Attention.apply(*args) if eager() else bidirectional_attention(*args)[:2]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*args)
        _setup_context(ctx, args, output)
        return output[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, *grads, None)


@torch.library.custom_op('mmbiformer::bidirectional_attention', mutates_args=())
def bidirectional_attention(
    latent_r: Tensor,
    latent_v: Tensor,
    token_r: Tensor,
    token_v: Tensor,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of latents and tokens, contiguous, and what the backward pass needs.

    These are each latent's largest logit and one over its sum of exponentials, (B, heads, 2, N).
    """
    return _forward(latent_r, latent_v, token_r, token_v, num_heads, scale)


@bidirectional_attention.register_fake
def _(latent_r, latent_v, token_r, token_v, num_heads, scale):
    return _empty_outputs(latent_r, latent_v, token_r, token_v, num_heads)


@torch.library.custom_op('mmbiformer::bidirectional_attention_backward', mutates_args=())
def bidirectional_attention_backward(
    latent_grad: Tensor,
    token_grad: Tensor,
    latent_r: Tensor,
    latent_v: Tensor,
    token_r: Tensor,
    token_v: Tensor,
    latents: Tensor,
    stats: Tensor,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four tensors, contiguous."""
    return _backward(
        latent_grad, token_grad, latent_r, latent_v, token_r, token_v, latents, stats, num_heads,
        scale,
    )  # fmt: skip


@bidirectional_attention_backward.register_fake
def _(latent_grad, token_grad, latent_r, latent_v, token_r, token_v, *others):
    return tuple(x.new_empty(x.shape) for x in (latent_r, latent_v, token_r, token_v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    latents, tokens, stats = output
    ctx.others = inputs[4:]
    ctx.save_for_backward(*inputs[:4], latents, stats)
    ctx.set_materialize_grads(False)
    ctx.token_shape = tokens.shape


def _differentiate(
    ctx: Any, latent_grad: Tensor | None, token_grad: Tensor | None, stats_grad: None
) -> tuple[Tensor | None, ...]:
    if latent_grad is None and token_grad is None:
        return (None,) * 6
    saved = ctx.saved_tensors  # read once: torch.utils.checkpoint gives them only once
    latents = saved[4]
    if latent_grad is None:
        latent_grad = torch.zeros_like(latents)
    if token_grad is None:
        token_grad = latents.new_zeros(ctx.token_shape)
    run = _backward if eager() else bidirectional_attention_backward
    return *run(latent_grad, token_grad, *saved, *ctx.others), None, None


bidirectional_attention.register_autograd(_differentiate, setup_context=_setup_context)


def _empty_outputs(
    latent_r: Tensor, latent_v: Tensor, token_r: Tensor, token_v: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, _ = latent_r.shape
    latents = token_v.new_empty(batch, count, token_v.shape[2])
    tokens = latent_v.new_empty(batch, token_r.shape[1], latent_v.shape[2])
    return latents, tokens, latent_r.new_empty(batch, num_heads, 2, count)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, num_heads, scale = args
    inputs = [*map(_adjacent, inputs)]  # under a name, so that copies live until it has run
    with unfilled_memory():
        outputs = _empty_outputs(*inputs, num_heads)
    latents, tokens, stats = outputs
    exchange = _exchange(num_heads, scale, stats, *inputs, latents, tokens)
    load().bidirectional_forward(ctypes.byref(exchange))
    return outputs


def _backward(latent_grad: Tensor, token_grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, latents, stats, num_heads, scale = args
    inputs = [*map(_adjacent, inputs)]
    latent_grad, token_grad = _adjacent(latent_grad), _adjacent(token_grad)
    with unfilled_memory():
        grads = tuple(x.new_empty(x.shape) for x in inputs)
    # The tokens' outputs are not needed; their gradients stand in for them.
    exchange = _exchange(
        num_heads, scale, stats, *inputs, latents, token_grad, latent_grad, token_grad, *grads
    )
    load().bidirectional_backward(ctypes.byref(exchange))
    return grads


def _adjacent(x: Tensor) -> Tensor:
    """Rows whose channels are adjacent in memory."""
    return x if x.stride(2) == 1 else x.contiguous()


class _Rows(ctypes.Structure):
    _fields_ = [
        ('data', ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ('image', 'row')),
    ]


ROWS = ('latent_r', 'latent_v', 'token_r', 'token_v', 'latent_out', 'token_out')
GRADS = ('latent_grad', 'token_grad')
GRADS += ('latent_r_grad', 'latent_v_grad', 'token_r_grad', 'token_v_grad')


class _Exchange(ctypes.Structure):
    """The fields of ``Exchange`` in bidirectional.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ('batch', 'heads', 'dim', 'value_dim')),
        *((name, ctypes.c_int64) for name in ('latents', 'tokens', 'threads')),
        *((name, _Rows) for name in ROWS),
        ('stats', ctypes.c_void_p),
        *((name, _Rows) for name in GRADS),
        ('scale', ctypes.c_float),
    ]


def _exchange(num_heads: int, scale: float, stats: Tensor, *rows: Tensor) -> _Exchange:
    latent_r, latent_v, token_r = rows[:3]
    heads = int(num_heads)  # may be NumPy's, which ctypes does not take
    return _Exchange(
        batch=len(latent_r),
        heads=heads,
        dim=latent_r.shape[2] // heads,
        value_dim=latent_v.shape[2] // heads,
        latents=latent_r.shape[1],
        tokens=token_r.shape[1],
        threads=torch.get_num_threads(),
        stats=stats.data_ptr(),
        scale=scale,
        **{
            name: _Rows(x.data_ptr(), *x.stride()[:2])
            for name, x in zip((*ROWS, *GRADS), rows, strict=False)
        },
    )
