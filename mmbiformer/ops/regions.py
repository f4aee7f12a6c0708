"""Regions: how a map is cut into the tiles that routing chooses between.

A map of (H, W) tokens and a region of (h, w) tokens make ceil(H / h) x ceil(W / w) regions,
numbered row by row. Where H or W is not a multiple, the last row or column of regions holds fewer
tokens: what would lie beyond the edge of the map does not exist.
"""

import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor


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

    Not ``-(-a // b)``: ONNX divides integers towards zero, so in an exported graph that would round
    down.
    """
    return (a + b - 1) // b


def auto_grid(
    query_size: tuple[int, int], topk: int, key_size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The grid that routes and attends at about the least cost, for a map of any size.

    Regions are square; their number per side grows with the cube root of the map's area (BiFormer,
    section 3.3). BiFormer's three routed stages get exactly the published 7x7 at 224x224, so
    pre-trained weights meet there what they were trained with. There are at least ``topk`` regions
    if the map has as many tokens; otherwise each token is a region, and ``topk`` should be lowered
    to their number.

    Args:
        query_size: Height and width of the query map, in tokens.
        topk: Regions each region is routed to, k.
        key_size: Height and width of the key map, in tokens. Defaults to None, the same as
            ``query_size``.

    Returns:
        tuple[int, int]: Regions per column and per row; none of them is empty.

    Raises:
        ValueError: If ``torch.export`` makes a graph for all sizes.
    """
    # S x S regions of Nq queries and Nk keys, of C channels, cost in multiply-adds
    #
    #     r S^4 + 2 k C Nq Nk / S^2,    least where    S^6 = (C / r) k Nq Nk,
    #
    # r for one affinity and its share of the top-k. By multiply-adds alone r is C, and BiFormer's
    # stages at 224x224 would get S = 15, 12 and 9. But choosing and gathering cost more than they
    # multiply, small tiles run slower, and weights are trained for one S: the published 7 is taken
    # for the best there. Stages have k = 1, 4, 16 and N = 56^2, 28^2, 14^2, always k N = 56^2, so
    # C / r = (7 / 64)^2 k gives 7 in each:
    #
    #     S^3 = 7 / 64 k sqrt(Nq Nk).
    if any(isinstance(n, torch.SymInt) for n in (*query_size, *(key_size or ()))):
        raise ValueError(
            "region_grid='auto' chooses a grid for each size and cannot be exported for all of "
            'them; give region_grid as a number, or export with fixed sizes'
        )
    # operator.index: to torch.compile sizes become constants here, and other sizes another graph.
    queries, keys = (
        math.sqrt(operator.index(size[0]) * operator.index(size[1]))
        for size in (query_size, key_size or query_size)
    )
    best = queries / (7 / 64 * topk * queries * keys) ** (1 / 3)
    most = queries / math.sqrt(topk)  # beyond it there would be fewer regions than topk
    side = max(1, min(round(best), math.floor(most)))
    return num_regions(query_size, (side, side))


# Whether PyTorch tells graphs to export from graphs to compile; 2.7 does so in part.
TELLS_EXPORTS = torch.__version__ >= (2, 8)


def exporting() -> bool:
    """Whether ``torch.export`` is making a graph, which should hold for maps of any size.

    Code that takes a short cut for some sizes must then leave it, as a branch would fix the size.
    ``torch.compile`` makes another graph for other sizes; before PyTorch 2.8, which cannot tell
    them apart, its graphs are those of ``torch.export``.
    """
    return _is_exporting() if TELLS_EXPORTS else torch.compiler.is_compiling()


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    # Called as it is, not traced: up to PyTorch 2.11 the traced answer is always yes
    # (https://github.com/pytorch/pytorch/issues/176347).
    return torch.compiler.is_exporting()


def with_symbols() -> bool:
    """Whether sizes are symbols that ``torch.sym_min`` and ``torch.sym_max`` take.

    They are in ``torch.export``, but where it traces as ``torch.compile`` does.
    """
    return exporting() and not torch.compiler.is_dynamo_compiling()


def always(condition: bool | torch.SymBool) -> bool:
    """Whether something holds of sizes: in a graph to export, of all those it is made for."""
    if not exporting():
        return bool(condition)
    if not with_symbols():
        return False  # to ask would fix the size
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def eager() -> bool:
    """Whether operations just run: no compiler, tracer or transform of ``torch.func`` looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad a map (B, H, W, C) at the right and bottom to (B, height, width, C)."""
    bottom, right = height - x.shape[1], width - x.shape[2]
    if always(bottom == 0) and always(right == 0):
        return x
    return F.pad(x, (0, 0, 0, right, 0, bottom))


def split_regions(x: Tensor, region_size: tuple[int, int]) -> Tensor:
    """Cut a map into regions; tokens beyond the edge are filled with zeros.

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


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The first ``height`` rows and ``width`` columns of a map (B, H, W, C)."""
    if always(height == x.shape[1]) and always(width == x.shape[2]):
        return x
    if exporting():
        # Whether a slice is contiguous depends on the size; a fresh map always is.
        x = x.index_select(1, torch.arange(height, device=x.device))
        return x.index_select(2, torch.arange(width, device=x.device))
    return x[:, :height, :width]


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
    """Number of the region that each token of a map lies in.

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
