"""Attention of a map's tokens to agents: points anywhere in the map, with a positional bias."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .tracing import eager

# Logits held at a time: as many as stay in a CPU's cache, or as many as keep a GPU busy.
LOGITS_ON_CPU = 2**21
LOGITS_ELSEWHERE = 2**27


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    rows: Tensor,
    columns: Tensor,
    scale: float,
) -> Tensor:
    """Let the tokens of a map attend to agents, biased by their relative position (DeBiFormer).

    The logit of a token and an agent is ``scale * q . k`` plus an entry of the head's table. The
    entry is read by bilinear interpolation at half the difference of their positions: -1 is the
    centre of the table's first entry, 1 the centre of its last.

    The agents of each image have a bias of their own. It is held for a few rows of the map at a
    time, and computed again in the backward pass. Bilinear interpolation is separable, so it is two
    batched matrix products with the interpolation's weights. On CPU they beat ``grid_sample``,
    which needs a grid twice the size of the bias and one thread an image. Their backward pass is
    deterministic on every device.

    Args:
        query: (B, H, W, C).
        key: (B, A, C), for A agents.
        value: (B, A, C).
        positions: (B, G, A, 2), float32 or float64: vertical and horizontal positions of the
            agents in [-1, 1], for each of G groups of heads.
        table: (heads, Th, Tw), Th and Tw at least 2. C is a multiple of the heads, and the heads
            are a multiple of G.
        rows: (H,), vertical positions of the tokens in [-1, 1], of the positions' dtype.
        columns: (W,), horizontal positions of the tokens in [-1, 1], of the same dtype.
        scale: Factor on the products of queries and keys.

    Returns:
        Tensor: (B, H, W, C).

    Raises:
        ValueError: If the table has another shape, if channels, heads and groups do not divide, or
            if positions, rows and columns do not share float32 or float64.
    """
    batch, _, width, channels = query.shape
    heads, table_height, table_width = table.shape if table.ndim == 3 else (0, 0, 0)
    groups, agents = positions.shape[1:3]
    if heads < 1 or min(table_height, table_width) < 2 or channels % heads or heads % groups:
        raise ValueError(
            f'the table must be (heads, 2 or more, 2 or more), with {channels} channels a multiple '
            f'of the heads and the heads a multiple of {groups} groups; got {tuple(table.shape)}'
        )
    dtypes = positions.dtype, rows.dtype, columns.dtype
    if dtypes not in ((torch.float32,) * 3, (torch.float64,) * 3):
        raise ValueError(
            'positions, rows and columns must all be in float32 or in float64; got '
            + ', '.join(map(str, dtypes))
        )
    table = table.to(positions.dtype).unflatten(0, (groups, -1))  # (G, heads / G, Th, Tw)
    key, value = (_heads(x, heads) for x in (key, value))  # (B * heads, A, C / heads)
    down, across = positions.unbind(-1)  # (B, G, A)
    across = interpolation_weights((columns - across[..., None]) / 2, table_width)

    def attend(query: Tensor, rows: Tensor) -> Tensor:
        """Some rows of the map: (B, h, W, C) to (B * heads, h * W, C / heads)."""
        weights = interpolation_weights((rows - down[..., None]) / 2, table_height)
        bias = torch.einsum('bgayi,ghij->bgahyj', weights, table)
        bias = torch.einsum('bgahyj,bgaxj->bghayx', bias, across)
        bias = bias.flatten(4).flatten(0, 2).to(query.dtype)  # (B * heads, A, h * W)
        logits = bias.baddbmm_(key, _heads(query.flatten(1, 2), heads).mT, alpha=scale)
        return logits.softmax(1).mT @ value

    device = query.device.type
    with nullcontext() if device == 'meta' else torch.autocast(device, enabled=False):
        if torch.compiler.is_compiling():  # the number of parts would fix the size
            parts = [(query, rows)]
        else:
            limit = LOGITS_ON_CPU if device == 'cpu' else LOGITS_ELSEWHERE
            step = max(1, limit // max(1, batch * heads * agents * width))
            parts = zip(query.split(step, 1), rows.split(step), strict=True)
        if torch.is_grad_enabled() and eager():
            outs = [
                checkpoint(attend, *part, use_reentrant=False, preserve_rng_state=False)
                for part in parts
            ]
        else:
            outs = [attend(*part) for part in parts]
    out = torch.cat(outs, 1).unflatten(0, (batch, heads)).transpose(1, 2)
    return out.reshape(query.shape)


def interpolation_weights(at: Tensor, size: int) -> Tensor:
    """Weights that read a list by linear interpolation.

    Args:
        at: Where to read: -1 is the first entry, 1 the last.
        size: Entries in the list, at least 2.

    Returns:
        Tensor: (\\*at.shape, size); their product with the list is the value at each place.
    """
    at = (at + 1) * ((size - 1) / 2)
    # Clamped as integers, so that a NaN gives a NaN and not an index out of range.
    left = at.detach().floor().long().clamp(0, size - 2)
    right_weight = (at - left)[..., None]
    weights = at.new_zeros(*at.shape, size)
    weights.scatter_(-1, left[..., None], 1 - right_weight)
    return weights.scatter_(-1, left[..., None] + 1, right_weight)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) to (B * heads, N, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)
