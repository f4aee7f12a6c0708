"""From tensors to calls of the library: which threads do what."""

import ctypes

import torch
from torch import Tensor

from ...settings import Settings
from .library import load

# Tasks for each thread: several, so that no thread waits long for the last one.
TASKS = 4
# Threads that share an image and a head need a copy each of the gradients of keys and values.
MOST_PARTS = 4


def forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """See :func:`mmbiformer.ops.schema.fused_attention`.

    Raises:
        IndexError: If ``routes`` has a number that no key region has.
    """
    batch, height, width, _ = query.shape
    # Under names, so that copies live until the library has run.
    query, key, value = map(_adjacent, (query, key, value))
    routes = routes.contiguous()
    out = query.new_empty(batch, height, width, value.shape[3])
    stats = query.new_empty(batch, settings.num_heads, 2, height * width, dtype=torch.float32)
    maps = dict(q=query, k=key, v=value, out=out, stats=_first(stats, out))
    problem = _problem(routes, settings, **maps)
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
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmbiformer.ops.schema.fused_attention_backward`."""
    query, key, value, grad_out = map(_adjacent, (query, key, value, grad_out))
    routes = routes.contiguous()
    tasks = max(1, len(query) * settings.num_heads)
    parts = max(1, min(-(-torch.get_num_threads() // tasks), MOST_PARTS, routes.shape[1]))
    grad_query = query.new_empty(query.shape, dtype=torch.float32)
    grad_key, grad_value = (x.new_zeros(parts, *x.shape, dtype=torch.float32) for x in (key, value))
    maps = dict(q=query, k=key, v=value, out=out, stats=_first(stats, out), grad_out=grad_out)
    maps |= dict(grad_q=grad_query, grad_k=grad_key[0], grad_v=grad_value[0])
    problem = _problem(routes, settings, **maps)
    problem.groups = _groups(problem, len(query))
    problem.parts = parts
    problem.part_k, problem.part_v = grad_key.stride(0), grad_value.stride(0)
    load().backward(ctypes.byref(problem))
    grads = (x[0] if parts == 1 else x.sum(0) for x in (grad_key, grad_value))
    return tuple(x.to(query.dtype) for x in (grad_query, *grads))


def _first(stats: Tensor, out: Tensor) -> Tensor:
    """The largest logits of the first head, as a map (B, Hq, Wq)."""
    return stats[:, 0, 0].view(out.shape[:3])


def _groups(problem: '_Problem', tasks: int) -> int:
    """How many groups of heads to cut each task into, for a number of tasks."""
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
        *((name, ctypes.c_int64) for name in ('threads', 'groups', 'parts', 'half')),
        *((name, _Grid) for name in ('queries', 'keys')),
        ('routes', ctypes.c_void_p),
        *((name, _Map) for name in ('q', 'k', 'v', 'out', 'stats')),
        *((name, _Map) for name in ('grad_out', 'grad_q', 'grad_k', 'grad_v')),
        *((name, ctypes.c_int64) for name in ('part_k', 'part_v')),
        ('scale', ctypes.c_float),
    ]


def _problem(routes: Tensor, settings: Settings, **maps: Tensor) -> _Problem:
    # Numbers may be NumPy's, which ctypes does not take.
    heads = int(settings.num_heads)
    return _Problem(
        batch=len(maps['q']),
        heads=heads,
        dim=maps['q'].shape[3] // heads,
        value_dim=maps['v'].shape[3] // heads,
        topk=routes.shape[2],
        threads=torch.get_num_threads(),
        half=maps['q'].dtype == torch.bfloat16,
        queries=_Grid(*maps['q'].shape[1:3], *map(int, settings.region_size)),
        keys=_Grid(*maps['k'].shape[1:3], *map(int, settings.key_region_size)),
        routes=routes.data_ptr(),
        scale=settings.scale,
        **{name: _Map(x.data_ptr(), *x.stride()[:3]) for name, x in maps.items()},
    )
