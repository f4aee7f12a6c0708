"""Pictures of what was recorded, as in BiFormer's paper."""

import math
import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from .record import RoutedBlock

QUERY, ROUTED = '#d7191c', '#2c7bb6'  # told apart by colour-blind people, too


def stride_of(name: str, length: int, tokens: int) -> int:
    """Pixels from token to token.

    Args:
        name: Of the attention. Those of the pyramids say the stage.
        length: Side of the image in pixels.
        tokens: Tokens of that side, for other models.
    """
    if stage := re.search(r'stages\.(\d+)\.', name):
        return 4 << int(stage[1])  # the map may be padded to many times its size
    return 2 ** round(math.log2(length / tokens))


def draw_routes(
    axes: Axes, image: np.ndarray, block: RoutedBlock, number: int, point: tuple[int, int]
) -> None:
    """Paint the region of a point and the regions that it is routed to; the best are the fullest.

    Args:
        axes: Where to draw.
        image: RGB, (H, W, 3), as the network sees it, from 0 to 255.
        block: The attention.
        number: Number of the image in the batch.
        point: x and y in pixels.
    """
    _show(axes, image)
    y, x = token_at(image, block, point)
    region = block.region(y, x)
    routes = block.routes[number, region].tolist()
    pixels = stride_of(block.name, image.shape[1], block.key.shape[2])
    for rank, route in enumerate(routes):
        share = 1 - rank / len(routes)
        box = _box(image, route, block.key_grid, block.key_region_size, pixels)
        axes.add_patch(Rectangle(*box, facecolor=ROUTED, alpha=0.2 + 0.4 * share, lw=0))
        axes.add_patch(Rectangle(*box, fill=False, edgecolor='white', lw=0.5))
    box = _box(image, region, block.query_grid, block.region_size, pixels * block.query_stride)
    axes.add_patch(Rectangle(*box, fill=False, edgecolor='white', lw=3))
    axes.add_patch(Rectangle(*box, fill=False, edgecolor=QUERY, lw=1.8))


def draw_weights(
    axes: Axes,
    image: np.ndarray,
    weights: np.ndarray,
    name: str,
    point: tuple[int, int] | None = None,
) -> None:
    """Paint how much is attended to each token over the image.

    Args:
        axes: Where to draw.
        image: RGB, (H, W, 3), from 0 to 255.
        weights: (Hk, Wk), 0 or more.
        name: Of the attention.
        point: x and y in pixels of what attends. Defaults to None.
    """
    height, width = image.shape[:2]
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    _show(axes, 0.6 * grey)
    rows, cols = weights.shape
    stride = stride_of(name, width, cols)
    extent = (0, cols * stride, rows * stride, 0)
    shown = np.ma.masked_less_equal(weights / max(weights.max(), 1e-30), 0)
    axes.imshow(shown, cmap='viridis', extent=extent, alpha=0.75, vmin=0, vmax=1)
    axes.set(xlim=(0, width), ylim=(height, 0))
    if point is not None:
        axes.plot(*point, marker='o', ms=6, mfc=QUERY, mec='white')


def token_at(image: np.ndarray, block: RoutedBlock, point: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the query token at a point (x, y) in pixels."""
    rows, cols = block.query.shape[1:3]
    x, y = point
    stride = stride_of(block.name, image.shape[1], block.key.shape[2]) * block.query_stride
    return min(y // stride, rows - 1), min(x // stride, cols - 1)


def _box(
    image: np.ndarray, region: int, grid: tuple[int, int], size: tuple[int, int], stride: int
) -> tuple[tuple[float, float], float, float]:
    """Left and top corner, width and height of a region in pixels; what pads a map is cut off."""
    sides = []
    for index, step, length in zip(divmod(region, grid[1]), size, image.shape[:2], strict=True):
        start = min(index * step * stride, length)
        sides.append((start, min(start + step * stride, length) - start))
    return (sides[1][0], sides[0][0]), sides[1][1], sides[0][1]


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image.clip(0, 255).astype(np.uint8))
    axes.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))
    axes.axis('off')
