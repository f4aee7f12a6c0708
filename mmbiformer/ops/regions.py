"""Regions: how a map is cut into the tiles that routing chooses between.

A map of (H, W) tokens and a region of (h, w) tokens make ceil(H / h) x ceil(W / w) regions,
numbered row by row. If H or W is not a multiple, the last row or column of regions holds fewer
tokens: nothing exists beyond the edge of the map.
"""

import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import always, exporting, with_symbols


def num_regions(map_size: tuple[int, int], region_size: tuple[int, int]) -> tuple[int, int]:
    """Regions per column and per row of a map.

    Args:
        map_size: Height and width of the map, in tokens.
        region_size: Height and width of a region, in tokens.

    Returns:
        tuple[int, int]: ceil(H / h) and ceil(W / w).
    """
    (height, width), (h, w) = map_size, region_size
    if not with_symbols():
        return ceil_div(height, h), ceil_div(width, w)
    rows, cols = height // h, width // w
    # In this form torch.export sees that a padded map has a known number of regions.
    return rows + torch.sym_min(1, height - rows * h), cols + torch.sym_min(1, width - cols * w)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for a and b above 0.

    Not ``-(-a // b)``: ONNX rounds integer division towards zero, which would round that down
    (findings/torch-onnx-ceil-division.sh).
    """
    return (a + b - 1) // b


def auto_grid(
    query_size: tuple[int, int], topk: int, key_size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The grid that routes and attends at about the least cost, for a map of any size.

    Regions are square. Their number per side grows with the cube root of the map's area (BiFormer,
    section 3.3). BiFormer's three routed stages get exactly the published 7x7 at 224x224, so
    pre-trained weights meet there what they were trained with. The grid has at least ``topk``
    regions if the map has as many tokens. Otherwise each token is a region, and the caller should
    lower ``topk`` to their number.

    Args:
        query_size: Height and width of the query map, in tokens.
        topk: Regions each region is routed to, k.
        key_size: Height and width of the key map, in tokens. Defaults to None, the same as
            ``query_size``.

    Returns:
        tuple[int, int]: Regions per column and per row; no region is empty.

    Raises:
        ValueError: If ``torch.export`` makes a graph for all sizes.
    """
    # The multiply-adds of S x S regions with Nq queries and Nk keys of C channels are
    #
    #     r S^4 + 2 k C Nq Nk / S^2,    least where    S^6 = (C / r) k Nq Nk,
    #
    # with r for one affinity and its share of the top-k. By multiply-adds alone r is C, and S would
    # be 15, 12 and 9 for BiFormer's stages at 224x224. But choosing and gathering cost more than
    # they multiply, small tiles run slower, and weights are trained for one S. So the published 7
    # is taken as the best there. The stages have k = 1, 4, 16 and N = 56^2, 28^2, 14^2, so k N is
    # always 56^2, and C / r = (7 / 64)^2 k gives 7 in each:
    #
    #     S^3 = 7 / 64 k sqrt(Nq Nk).
    if any(isinstance(n, torch.SymInt) for n in (*query_size, *(key_size or ()))):
        raise ValueError(
            "region_grid='auto' chooses a grid for each size, so it cannot be exported for all "
            'sizes; give region_grid as a number, or export with fixed sizes'
        )
    # operator.index makes sizes constants to torch.compile, and other sizes another graph.
    queries, keys = (
        math.sqrt(operator.index(size[0]) * operator.index(size[1]))
        for size in (query_size, key_size or query_size)
    )
    best = queries / (7 / 64 * topk * queries * keys) ** (1 / 3)
    most = queries / math.sqrt(topk)  # larger regions would be fewer than topk
    side = max(1, min(round(best), math.floor(most)))
    return num_regions(query_size, (side, side))


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad a map (B, H, W, C) at the right and bottom to (B, height, width, C)."""
    bottom, right = height - x.shape[1], width - x.shape[2]
    if always(bottom == 0) and always(right == 0):
        return x
    return F.pad(x, (0, 0, 0, right, 0, bottom))


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The first ``height`` rows and ``width`` columns of a map (B, H, W, C)."""
    if always(height == x.shape[1]) and always(width == x.shape[2]):
        return x
    if exporting():
        # Whether a slice is contiguous depends on the size; a copy always is.
        x = x.index_select(1, torch.arange(height, device=x.device))
        return x.index_select(2, torch.arange(width, device=x.device))
    return x[:, :height, :width]


def split_regions(x: Tensor, region_size: tuple[int, int]) -> Tensor:
    """Cut a map into regions; places beyond the edge are filled with zeros.

    Args:
        x: Map of shape (B, H, W, C).
        region_size: Height h and width w of a region, in tokens.

    Returns:
        Tensor: (B, R, T, C), with R regions of T = h * w tokens, both in row-major order.
    """
    batch, height, width, channels = x.shape
    h, w = region_size
    rows, cols = num_regions((height, width), region_size)
    x = pad_to(x, rows * h, cols * w)
    x = x.reshape(batch, rows, h, cols, w, channels).transpose(2, 3)
    return x.reshape(batch, rows * cols, h * w, channels)


def merge_regions(x: Tensor, map_size: tuple[int, int], region_size: tuple[int, int]) -> Tensor:
    """Put regions back into a map: the inverse of :func:`split_regions`.

    Args:
        x: Regions of shape (B, R, T, C).
        map_size: Height H and width W of the map, in tokens.
        region_size: Height h and width w of a region, in tokens.

    Returns:
        Tensor: (B, H, W, C); tokens beyond the edge of the map are dropped.
    """
    batch, _, _, channels = x.shape
    (height, width), (h, w) = map_size, region_size
    rows, cols = num_regions(map_size, region_size)
    x = x.reshape(batch, rows, cols, h, w, channels).transpose(2, 3)
    return crop(x.reshape(batch, rows * h, cols * w, channels), height, width)


def existing_tokens(
    map_size: tuple[int, int], region_size: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """Which tokens of each region lie inside the map.

    Args:
        map_size: Height and width of the map, in tokens.
        region_size: Height and width of a region, in tokens.
        device: Device of the result. Defaults to None, the current default device.

    Returns:
        Tensor: Boolean, (R, T).
    """
    inside = torch.ones(1, *map_size, 1, dtype=torch.bool, device=device)
    return split_regions(inside, region_size)[0, :, :, 0]


def region_of_token(
    map_size: tuple[int, int], region_size: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """The number of the region that each token of a map lies in.

    Args:
        map_size: Height H and width W of the map, in tokens.
        region_size: Height and width of a region, in tokens.
        device: Device of the result. Defaults to None, the current default device.

    Returns:
        Tensor: int64, (H * W,), tokens and regions in row-major order.
    """
    (height, width), (h, w) = map_size, region_size
    rows = torch.arange(height, device=device) // h
    cols = torch.arange(width, device=device) // w
    return (rows[:, None] * num_regions(map_size, region_size)[1] + cols).flatten()
