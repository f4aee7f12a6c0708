"""Routed attention on PyTorch's fused attention: right anywhere, made to be fast on CPU.

Two ways to one result. Usually the routed keys and values are gathered region by region, and each
query region attends to its own. Where regions hold few tokens, tiles of that size waste the matrix
units, and it is cheaper to let all tokens attend to all under a mask.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..regions import (
    existing_tokens,
    exporting,
    merge_regions,
    num_regions,
    region_of_token,
    split_regions,
)

Size = tuple[int, int]


def why_not(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> str | None:
    """PyTorch's attention runs anything, anywhere."""
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_heads: int,
    region_size: Size,
    key_region_size: Size,
    scale: float,
) -> Tensor:
    """See :func:`mmbiformer.ops.routed_attention`."""
    all_keys = key.shape[1] * key.shape[2]
    routed_keys = routes.shape[2] * key_region_size[0] * key_region_size[1]
    # Measured on CPU: gathered tiles of 4, 16 and 64 query tokens run at about 1/5, 1/2 and 2/3 of
    # the speed of the dense product.
    if exporting():
        run = _attend_gathered
    elif all_keys <= routed_keys * (1 + 16 / (region_size[0] * region_size[1])):
        run = _attend_under_mask
    elif _keeps_copies(query, value):
        run = _GatheredFlash.apply
    else:
        run = _attend_gathered
    return run(query, key, value, routes, num_heads, region_size, key_region_size, scale)


def _keeps_copies(query: Tensor, value: Tensor) -> bool:
    """Whether autograd would keep gathered copies that :class:`_GatheredFlash` spares, on CPU."""
    runs = query.device.type == 'cpu' and query.shape[3] == value.shape[3] and len(query) > 0
    return runs and torch.is_grad_enabled() and not torch.jit.is_tracing()


def _attend_under_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_heads: int,
    region_size: Size,
    key_region_size: Size,
    scale: float,
) -> Tensor:
    """All tokens attend to all, in image order, with -inf where there is no route."""
    rows, cols = num_regions(key.shape[1:3], key_region_size)
    # How often a region is listed; the logarithm turns 0 into -inf and counts repetitions.
    regions = torch.arange(rows * cols, device=routes.device)
    listed = (routes[..., None] == regions).sum(2).to(query.dtype).log()  # (B, Rq, Rk)
    # Keys first, while there are few rows; whole rows are then copied for the queries.
    mask = listed.index_select(2, region_of_token(key.shape[1:3], key_region_size, key.device))
    mask = mask.index_select(1, region_of_token(query.shape[1:3], region_size, query.device))
    q, k, v = (_heads(x.flatten(1, 2), num_heads) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale)
    return out.transpose(1, 2).reshape(*query.shape[:3], value.shape[3])


def _attend_gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_heads: int,
    region_size: Size,
    key_region_size: Size,
    scale: float,
) -> Tensor:
    """Query regions attend to gathered copies of their routed regions."""
    rows = _flat_rows(routes, key, key_region_size)
    q, k, v, mask = _operands(
        query, key, value, routes, rows, num_heads, region_size, key_region_size
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return _merge(out, query, region_size)


class _GatheredFlash(torch.autograd.Function):
    """:func:`_attend_gathered` that keeps no gathered copy for the backward pass, on CPU.

    Gathering again costs a few percent of the attention; the copies would be k times keys and
    values. PyTorch's own CPU kernels are called directly, as their log-sum-exp is not to be had
    from ``scaled_dot_product_attention``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        routes: Tensor,
        num_heads: int,
        region_size: Size,
        key_region_size: Size,
        scale: float,
    ) -> Tensor:
        ctx.geometry = num_heads, region_size, key_region_size
        ctx.scale = scale
        rows = _flat_rows(routes, key, key_region_size)
        q, k, v, mask = _operands(query, key, value, routes, rows, *ctx.geometry)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(query, key, value, routes, out, lse)
        return _merge(out, query, region_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, routes, out, lse = ctx.saved_tensors
        num_heads, region_size, key_region_size = ctx.geometry
        rows = _flat_rows(routes, key, key_region_size)
        q, k, v, mask = _operands(query, key, value, routes, rows, *ctx.geometry)
        grad = _heads(split_regions(grad, region_size).flatten(0, 1), num_heads)
        grad_q, grad_k, grad_v = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=ctx.scale
            )
        )
        return (
            _merge(grad_q, query, region_size),
            _scatter(grad_k, rows, key, key_region_size),
            _scatter(grad_v, rows, value, key_region_size),
            *(None,) * 5,
        )


def _operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    rows: Tensor,
    num_heads: int,
    region_size: Size,
    key_region_size: Size,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, gathered keys and values as (B * Rq, heads, tokens, dim), and their mask."""
    q = split_regions(query, region_size).flatten(0, 1)
    k = _gather(key, rows, routes, key_region_size)
    v = _gather(value, rows, routes, key_region_size)
    mask = _edge_mask(key, routes, key_region_size)
    return *(_heads(x, num_heads) for x in (q, k, v)), mask


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(N, T, C) to (N, heads, T, C / heads)."""
    # PyTorch's kernel on CPU takes channels for neighbours: of other maps it reads wrong numbers.
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _flat_rows(routes: Tensor, key: Tensor, key_region_size: Size) -> Tensor:
    """Routed regions numbered through the batch, (B * Rq * k,)."""
    rows, cols = num_regions(key.shape[1:3], key_region_size)
    image = torch.arange(routes.shape[0], device=routes.device)[:, None, None]
    return (routes + image * (rows * cols)).flatten()


def _gather(x: Tensor, rows: Tensor, routes: Tensor, region_size: Size) -> Tensor:
    """Map (B, H, W, C) to the tokens routed to, (B * Rq, k * T, C)."""
    regions = split_regions(x, region_size).flatten(0, 1)
    shape = routes.shape[0] * routes.shape[1], routes.shape[2] * regions.shape[1], x.shape[3]
    return regions.index_select(0, rows).view(shape)


def _scatter(x: Tensor, rows: Tensor, like: Tensor, region_size: Size) -> Tensor:
    """The adjoint of :func:`_gather`, from heads: (B * Rq, heads, k * T, C / heads) to a map."""
    regions = num_regions(like.shape[1:3], region_size)
    shape = like.shape[0], regions[0] * regions[1], region_size[0] * region_size[1], like.shape[3]
    total = x.new_zeros(shape)
    # One long row a region, in the order of the list: fast, and the same sum every time.
    x = x.transpose(1, 2).reshape(len(rows), shape[2] * shape[3])
    total.view(-1, shape[2] * shape[3]).index_add_(0, rows, x)
    return merge_regions(total, like.shape[1:3], region_size)


def _edge_mask(key: Tensor, routes: Tensor, region_size: Size) -> Tensor | None:
    """0 for tokens inside the map and -inf outside, (B * Rq, 1, 1, k * T); None if all are in."""
    rows, cols = num_regions(key.shape[1:3], region_size)
    whole = rows * region_size[0], cols * region_size[1]
    if not exporting() and whole == tuple(key.shape[1:3]):
        return None
    exists = existing_tokens(key.shape[1:3], region_size, key.device)
    mask = torch.zeros(exists.shape, dtype=key.dtype, device=key.device)
    mask = mask.masked_fill(~exists, -torch.inf)
    return mask[routes].flatten(2).flatten(0, 1)[:, None, None]


def _merge(x: Tensor, like: Tensor, region_size: Size) -> Tensor:
    """Heads of regions (B * R, heads, T, C / heads) to a map of the size of ``like``."""
    rows, cols = num_regions(like.shape[1:3], region_size)
    x = x.transpose(1, 2).flatten(2).unflatten(0, (like.shape[0], rows * cols))
    return merge_regions(x, like.shape[1:3], region_size)
