"""From tensors to calls of the library: which threads do what."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import load

# Tasks for each thread, so that none waits long for the last.
TASKS = 4
# A thread without an image or a head of its own needs a copy of the gradients of keys and values.
MOST_PARTS = 4


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_heads: int,
    region_size: Sequence[int],
    key_region_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`mmbiformer.ops.schema.fused_attention`; IndexError for routes to no region."""
    batch, height, width, _ = query.shape
    # By names, so that copies live until the library has run.
    query, key, value = map(_adjacent, (query, key, value))
    routes = routes.contiguous()
    out = query.new_empty(batch, height, width, value.shape[3])
    stats = query.new_empty(batch, num_heads, 2, height * width)
    problem = _problem(
        query,
        key,
        value,
        routes,
        num_heads,
        region_size,
        key_region_size,
        scale,
        out=out,
        stats=_first(stats, out),
    )
    problem.groups = _groups(problem, batch * routes.shape[1])
    library = load()
    if not library.routes_exist(ctypes.byref(problem)):
        raise IndexError('routes has numbers that no key region has')
    library.forward(ctypes.byref(problem))
    return out, stats


def backward(
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
    """See :func:`mmbiformer.ops.schema.fused_attention_backward`."""
    query, key, value, grad_out = map(_adjacent, (query, key, value, grad_out))
    routes = routes.contiguous()
    tasks = max(1, len(query) * num_heads)
    parts = max(1, min(-(-torch.get_num_threads() // tasks), MOST_PARTS, routes.shape[1]))
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = (x.new_zeros(parts, *x.shape) for x in (key, value))
    problem = _problem(
        query,
        key,
        value,
        routes,
        num_heads,
        region_size,
        key_region_size,
        scale,
        out=out,
        stats=_first(stats, out),
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
    return grad_query, *grads


def _first(stats: Tensor, out: Tensor) -> Tensor:
    """The first head's largest logits, as a map (B, Hq, Wq)."""
    return stats[:, 0, 0].view(out.shape[:3])


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
    region_size: Sequence[int],
    key_region_size: Sequence[int],
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
