"""How a layer's region grid cuts a map: arguments, their checks, and padding to the grid."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..ops.regions import ceil_div, pad_to

PADDINGS = ('input', 'projected', 'mask')


def to_grid(region_grid: int | tuple[int, int] | str) -> tuple[int, int] | str:
    """Regions per column and per row from an int or a pair; ``'auto'`` stays ``'auto'``.

    Raises:
        ValueError: If it is anything else.
    """
    if region_grid == 'auto':
        return region_grid
    pair = region_grid if isinstance(region_grid, (list, tuple)) else (region_grid, region_grid)
    if len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
        raise ValueError(
            f"region_grid={region_grid!r} must be a positive int or a pair of them, or 'auto'"
        )
    return tuple(pair)


def check_topk(topk: int, grid: tuple[int, int] | str) -> None:
    """Raise ValueError unless ``topk`` regions can be chosen from a grid; ``'auto'`` has enough."""
    if grid == 'auto':
        if topk < 1:
            raise ValueError(f'topk={topk} must be positive')
        return
    regions = math.prod(grid)
    if not 1 <= topk <= regions:
        raise ValueError(
            f'topk={topk} does not fit the {regions} regions of a {grid[0]}x{grid[1]} grid; '
            f'choose 1 <= topk <= {regions} or a finer region_grid'
        )


def check_padding(padding: str, known: Sequence[str] = PADDINGS) -> None:
    """Raise ValueError unless a padding policy is one of those that a layer knows."""
    if padding not in known:
        raise ValueError(f'padding={padding!r} is unknown; choose one of {list(known)}')


def region_size(map_size: Sequence[int], grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a region, in tokens: the grid's share of the map, rounded up."""
    return tuple(ceil_div(n, regions) for n, regions in zip(map_size, grid, strict=True))


def pad_to_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Zero-pad a map (B, H, W, C) at the right and bottom to multiples of the grid."""
    size = region_size(x.shape[1:3], grid)
    return pad_to(x, grid[0] * size[0], grid[1] * size[1])
