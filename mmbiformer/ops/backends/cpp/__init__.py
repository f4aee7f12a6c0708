"""Routed attention in fused C++, for CPUs; importing this compiles nothing.

Keys and values are read from where they lie: nothing is gathered or rearranged in memory, forward
or backward (but a map whose channels are not adjacent is copied first). The library is compiled
when it is first needed (:mod:`.library`), for the processor it runs on.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from ...regions import eager
from .library import load, why_no_library

LANES = 8  # floats that attention.cpp reads at a time
# Tasks for each thread, so that none waits long for the last.
TASKS = 4
# A thread without an image or a head of its own needs a copy of the gradients of keys and values.
MOST_PARTS = 4


def why_not(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> str | None:
    """Why these tensors cannot be run, or None."""
    maps = query, key, value
    if query.device.type != 'cpu':
        return f'tensors are on {query.device.type}, and it is made for CPUs'
    if not query.dtype == key.dtype == value.dtype == torch.float32:
        return (
            f'query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; '
            'it takes torch.float32'
        )
    for x in maps:
        if x.shape[3] // num_heads % LANES:
            return f'heads of {x.shape[3] // num_heads} channels; they must be multiples of {LANES}'
    if not eager() or any(type(x) not in (Tensor, Parameter) for x in maps):
        return 'a compiler, tracer, transform or subclass of tensors wants to see what is computed'
    return why_no_library()


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
    """See :func:`mmbiformer.ops.routed_attention`; raises IndexError for routes to no region."""
    return _FusedAttention.apply(
        *map(_adjacent, (query, key, value)),
        routes.contiguous(),
        num_heads,
        region_size,
        key_region_size,
        scale,
    )


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        stats = query.new_empty(*query.shape[:3], 2 * others[1])
        problem = _problem(query, key, value, *others, out=out, stats=stats)
        problem.groups = _groups(problem, len(query) * others[0].shape[1])
        library = load()
        if not library.routes_exist(ctypes.byref(problem)):
            raise IndexError('routes has numbers that no key region has')
        library.forward(ctypes.byref(problem))
        routes, *ctx.others = others
        ctx.save_for_backward(query, key, value, routes, out, stats)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, routes, out, stats = ctx.saved_tensors
        num_heads, threads = ctx.others[0], torch.get_num_threads()
        grad_out = _adjacent(grad_out)  # here, so that it lives until the library has run
        tasks = max(1, len(query) * num_heads)
        parts = max(1, min(-(-threads // tasks), MOST_PARTS, routes.shape[1]))
        grad_query = query.new_empty(query.shape)
        grad_key, grad_value = (x.new_zeros(parts, *x.shape) for x in (key, value))
        problem = _problem(
            query,
            key,
            value,
            routes,
            *ctx.others,
            out=out,
            stats=stats,
            grad_out=grad_out,
            grad_q=grad_query,
            grad_k=grad_key[0],
            grad_v=grad_value[0],
        )
        problem.groups = _groups(problem, len(query))
        problem.parts = parts
        problem.part_k, problem.part_v = grad_key.stride(0), grad_value.stride(0)
        load().backward(ctypes.byref(problem))
        grads = (x[0] if parts == 1 else x.sum(0) for x in (grad_key, grad_value))
        return grad_query, *grads, *(None,) * 5


def _groups(problem: '_Problem', tasks: int) -> int:
    """Into how many groups of heads to cut each of so many tasks."""
    return min(-(-TASKS * problem.threads // max(1, tasks)), problem.heads)


def _adjacent(x: Tensor) -> Tensor:
    """A map whose channels are adjacent in memory."""
    return x if x.stride(3) == 1 else x.contiguous()


class _Map(ctypes.Structure):
    _fields_ = [
        ('data', ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ('image', 'row', 'col')),
    ]


class _Grid(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ('height', 'width', 'h', 'w')]


class _Problem(ctypes.Structure):
    """The fields of ``Problem`` in attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ('batch', 'heads', 'dim', 'value_dim', 'topk')),
        *((name, ctypes.c_int64) for name in ('threads', 'groups', 'parts')),
        *((name, _Grid) for name in ('queries', 'keys')),
        ('routes', ctypes.c_void_p),
        *((name, _Map) for name in ('q', 'k', 'v', 'out', 'stats')),
        *((name, _Map) for name in ('grad_out', 'grad_q', 'grad_k', 'grad_v')),
        *((name, ctypes.c_int64) for name in ('part_k', 'part_v')),
        ('scale', ctypes.c_float),
    ]


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_heads: int,
    region_size: tuple[int, int],
    key_region_size: tuple[int, int],
    scale: float,
    **maps: Tensor,
) -> _Problem:
    maps = dict(q=query, k=key, v=value) | maps
    return _Problem(
        batch=len(query),
        heads=int(num_heads),
        dim=query.shape[3] // int(num_heads),
        value_dim=value.shape[3] // int(num_heads),
        topk=routes.shape[2],
        threads=torch.get_num_threads(),
        queries=_Grid(*query.shape[1:3], *map(int, region_size)),
        keys=_Grid(*key.shape[1:3], *map(int, key_region_size)),
        routes=routes.data_ptr(),
        scale=scale,
        **{name: _Map(x.data_ptr(), *x.stride()[:3]) for name, x in maps.items()},
    )
