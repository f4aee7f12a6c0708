"""Routed attention on PyTorch's fused attention: runs anywhere, on CPU in little memory.

There are two ways to the result. Usually the routed keys and values are gathered for each query
region, which attends to them. If regions hold few tokens, tiles of that size waste the matrix
units. Then it is cheaper to let all tokens attend to all under a mask.
"""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..regions import crop, existing_tokens, num_regions, pad_to, region_of_token
from ..settings import Settings
from ..tracing import always, eager, exporting

Size = tuple[int, int]

# Gathered keys and values held at a time: few enough to stay in the processor's cache.
PIECE_BYTES = 2**21


def why_not(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> str | None:
    """PyTorch's attention runs anything, anywhere."""
    return None


def attend(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, settings: Settings) -> Tensor:
    """See :func:`mmbiformer.ops.routed_attention`."""
    all_keys = key.shape[1] * key.shape[2]
    routed_keys = routes.shape[2] * prod(settings.key_region_size)
    # Measured on CPU: gathered tiles of 4, 16 and 64 query tokens run at about 1/5, 1/2 and 2/3 of
    # the speed of the dense product.
    if exporting():
        run = _attend_gathered
    elif all_keys <= routed_keys * (1 + 16 / prod(settings.region_size)):
        run = _attend_under_mask
    elif _in_pieces(query, value):
        run = _attend_in_pieces
    else:
        run = _attend_gathered
    return run(query, key, value, routes, settings)


def _in_pieces(query: Tensor, value: Tensor) -> bool:
    """Whether :class:`_GatheredInPieces` can run, which calls PyTorch's kernels for CPU."""
    runs = query.device.type == 'cpu' and query.shape[3] == value.shape[3] and len(query) > 0
    # Transforms of torch.func need more of an autograd.Function.
    return runs and (torch.compiler.is_compiling() or eager())


def _attend_under_mask(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, settings: Settings
) -> Tensor:
    """All tokens attend to all, in image order, with a mask where there is no route."""
    heads, region_size, key_region_size, scale = settings
    rows, cols = num_regions(key.shape[1:3], key_region_size)
    # How often a region is listed: its logarithm counts repetitions, and turns 0 into -inf.
    listed = query.new_zeros(*routes.shape[:2], rows * cols)  # (B, Rq, Rk)
    listed = listed.scatter_add(2, routes, query.new_ones(()).expand(routes.shape)).log()
    # Keys first, while there are few rows. Then whole rows are copied for the queries.
    mask = listed.index_select(2, region_of_token(key.shape[1:3], key_region_size, key.device))
    mask = mask.index_select(1, region_of_token(query.shape[1:3], region_size, query.device))
    q, k, v = (_heads(x.flatten(1, 2), heads) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale)
    return out.transpose(1, 2).reshape(*query.shape[:3], value.shape[3])


def _attend_gathered(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, settings: Settings
) -> Tensor:
    """Query regions attend to gathered copies of their routed regions."""
    q, k, v, rows, mask = _prepare(query, key, value, routes, settings)
    out = F.scaled_dot_product_attention(
        *_operands(q, k, v, rows), attn_mask=mask, scale=settings.scale
    )
    out = out.unflatten(2, settings.region_size).unflatten(0, (q.shape[0], q.shape[2]))
    out = out.permute(0, 3, 1, 4, 2, 5)
    return _map(out.flatten(4).contiguous(), query)


def _attend_in_pieces(query: Tensor, *args: Any) -> Tensor:
    out = _GatheredInPieces.apply(query, *args, torch.is_grad_enabled())
    return crop(out, *query.shape[1:3])  # a view made in there could not be changed in place


class _GatheredInPieces(torch.autograd.Function):
    """:func:`_attend_gathered` for a few rows of regions at a time, on CPU, without cropping.

    Each piece reuses the memory of the piece before it. Nothing that was gathered is kept for the
    backward pass: gathering again costs a few percent of the attention, and the copies would be k
    times keys and values. PyTorch's CPU kernels are called directly, because
    ``scaled_dot_product_attention`` does not return their log-sum-exp.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        routes: Tensor,
        settings: Settings,
        keep: bool,
    ) -> Tensor:
        q, k, v, rows, mask = _prepare(query, key, value, routes, settings)
        step = _strips_at_a_time(q, k, v, rows)
        # Kept, because the backward pass may be compiled where this one is not.
        ctx.settings, ctx.step = settings, step
        height = len(q) // len(query) * settings.region_size[0]
        out = q.new_empty(len(query), height, q.shape[2] * q.shape[3], value.shape[3])
        out_strips = _strips(out, settings.region_size)
        sums = []
        for strips, regions in _pieces(q, step):
            part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_operands(q[strips], k, v, rows[regions]),
                attn_mask=None if mask is None else mask[regions],
                scale=settings.scale,
            )
            sums.append(lse)
            _put(out_strips[strips], part)
        # Not the parts: each would hold the memory of its piece.
        kept = (out, torch.cat(sums)) if keep else ()
        ctx.save_for_backward(query, key, value, routes, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, routes, out, sums = ctx.saved_tensors
        heads, region_size, key_region_size, scale = ctx.settings
        q, k, v, rows, mask = _prepare(query, key, value, routes, ctx.settings)
        out, grad = (_strips(x, region_size) for x in (out, grad))
        grad_query = q.new_empty(q.shape)
        totals = [torch.zeros_like(x) for x in (k, v)]
        for strips, regions in _pieces(q, ctx.step):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _by_head(grad[strips], heads).unflatten(0, (-1, heads)),
                *_operands(q[strips], k, v, rows[regions]),
                _by_head(out[strips], heads).unflatten(0, (-1, heads)),
                sums[regions],
                0.0,
                False,
                attn_mask=None if mask is None else mask[regions],
                scale=scale,
            )
            _put(grad_query[strips], grads[0])
            for total, each in zip(totals, grads[1:], strict=True):
                # One long row a region, added in the order of the list: fast and deterministic.
                chosen = rows[regions].flatten()
                total.flatten(1).index_add_(0, chosen, each.reshape(len(chosen), -1))
        grads = [_map(grad_query, query)]
        for total, x in zip(totals, (key, value), strict=True):
            cols, (h, w) = num_regions(x.shape[1:3], key_region_size)[1], key_region_size
            strips = total.new_empty(len(total) // (cols * heads), h, cols, w, x.shape[3])
            _put(strips, total)
            grads.append(_map(strips, x))
        return *grads, None, None, None


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Strips of queries, keys and values by head, their routed rows, and the mask of the edge."""
    heads, region_size, key_region_size, _ = settings
    k, v = (_by_head(_strips(x, key_region_size), heads) for x in (key, value))
    rows = _rows_by_head(routes, key, key_region_size, heads)
    return _strips(query, region_size), k, v, rows, _edge_mask(key, routes, key_region_size)


def _strips_at_a_time(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> int:
    if torch.compiler.is_compiling():
        return len(q)
    cols, (_, heads, topk), (_, tokens, dim) = q.shape[2], rows.shape, k.shape
    gathered = cols * heads * topk * tokens * (dim + v.shape[2]) * k.element_size()
    return max(1, PIECE_BYTES // max(1, gathered))


def _pieces(q: Tensor, step: int) -> list[tuple[slice, slice]]:
    """The strips of each piece, and the query regions in them."""
    cols = q.shape[2]
    return [
        (slice(start, start + step), slice(start * cols, (start + step) * cols))
        for start in range(0, len(q), step)
    ]


def _operands(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of some strips, their gathered keys and values: (regions, heads, tokens, dim)."""
    regions, heads, topk = rows.shape
    if torch.compiler.is_compiling():  # for flat rows Inductor looks up each number anew
        gathered = (x[rows] for x in (k, v))
    else:
        gathered = (x.index_select(0, rows.flatten()) for x in (k, v))
    k, v = (x.view(regions, heads, topk * x.shape[-2], x.shape[-1]) for x in gathered)
    return _by_head(q, heads).unflatten(0, (regions, heads)), k, v


def _strips(x: Tensor, region_size: Size) -> Tensor:
    """Map (B, H, W, C) to its rows of regions, (B * rows, h, cols, w, C): a view if possible."""
    h, w = region_size
    rows, cols = num_regions(x.shape[1:3], region_size)
    return pad_to(x, rows * h, cols * w).reshape(x.shape[0] * rows, h, cols, w, x.shape[3])


def _map(strips: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_strips`, for a map of the size of ``like``."""
    _, h, cols, w, channels = strips.shape
    rows, _ = num_regions(like.shape[1:3], (h, w))
    return crop(strips.view(like.shape[0], rows * h, cols * w, channels), *like.shape[1:3])


def _heads_of_regions(strips: Tensor, num_heads: int) -> Tensor:
    """Strips (n, h, cols, w, C) seen as (n, cols, heads, h, w, C / heads)."""
    return strips.unflatten(-1, (num_heads, -1)).permute(0, 2, 4, 1, 3, 5)


def _by_head(strips: Tensor, num_heads: int) -> Tensor:
    """Strips (n, h, cols, w, C) to (n * cols * heads, h * w, C / heads), contiguous.

    PyTorch's kernel assumes that channels are adjacent in memory, and misreads other maps.
    """
    x = _heads_of_regions(strips, num_heads)
    return x.flatten(3, 4).flatten(0, 2).contiguous()


def _put(strips: Tensor, x: Tensor) -> None:
    """Write the result of :func:`_by_head` into strips; heads may have an axis of their own."""
    target = _heads_of_regions(strips, strips.shape[4] // x.shape[-1])
    target.copy_(x.reshape(target.shape))


def _rows_by_head(routes: Tensor, key: Tensor, key_region_size: Size, num_heads: int) -> Tensor:
    """Routed regions of each head, in the numbers of :func:`_by_head`: (B * Rq, heads, k)."""
    rows, cols = num_regions(key.shape[1:3], key_region_size)
    image = torch.arange(routes.shape[0], device=routes.device)[:, None, None]
    regions = (routes + image * (rows * cols)).flatten(0, 1)
    return regions[:, None] * num_heads + torch.arange(num_heads, device=routes.device)[:, None]


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(N, T, C) to (N, heads, T, C / heads)."""
    # PyTorch's kernel on CPU assumes adjacent channels, as in :func:`_by_head`.
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _edge_mask(key: Tensor, routes: Tensor, region_size: Size) -> Tensor | None:
    """0 inside the map, -inf outside: (B * Rq, 1, 1, k * T); None if all are inside."""
    rows, cols = num_regions(key.shape[1:3], region_size)
    (height, width), (h, w) = key.shape[1:3], region_size
    if always(rows * h == height) and always(cols * w == width):
        return None
    exists = existing_tokens(key.shape[1:3], region_size, key.device)
    mask = torch.zeros(exists.shape, dtype=key.dtype, device=key.device)
    mask = mask.masked_fill(~exists, -torch.inf)
    return mask[routes].flatten(2).flatten(0, 1)[:, None, None]
