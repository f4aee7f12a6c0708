"""Bi-level routing attention as a layer."""

import math

from torch import Tensor, nn

from ..ops import auto_grid, check_backend, num_regions, route_regions, routed_attention
from ..ops.regions import ceil_div, crop, pad_to
from .conv import DepthwiseConv2d
from .inplace import add
from .linear import Linear

PADDINGS = ('input', 'projected', 'mask')


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention, BRA (BiFormer, section 3.2; the authors' ``ops/bra_legacy.py``).

    The map is cut into a grid of regions. Each region is routed to the ``topk`` regions it is most
    akin to; each token attends to all tokens there. A depthwise convolution of the values (LePE) is
    added before the output projection. The logits are scaled by ``dim ** -0.5``: the whole width,
    as in the released models, not the head's.

    A map whose sides are not multiples of the grid needs a ``padding`` policy:

    - ``'input'``: the input is zero-padded at the right and bottom to a multiple of the grid
      before it is projected. Padded tokens carry the projection's bias, count in the region means
      and are attended to. BiFormer-T, -S, -B and -STL were trained and released so.
    - ``'projected'``: regions measure floor(H / grid) x floor(W / grid) tokens, so there can be
      more of them than the grid says; queries, keys and values are zero-padded, and padded keys
      (logit 0, value 0) are attended to. Region means exclude them. BiFormer-STL-nchw was
      released so (the authors' ``ops/bra_nchw.py``).
    - ``'mask'``: regions measure ceil(H / grid) x ceil(W / grid) tokens and end at the edge of the
      map: nothing outside counts, nothing outside is attended to. There can be fewer regions than
      the grid says; if there are fewer than ``topk``, all of them are attended to.

    Args:
        dim: Channels, C.
        num_heads: Number of attention heads.
        topk: Regions each region is routed to.
        region_grid: Regions per column and per row, an int or a pair, or ``'auto'``: chosen for
            each map by :func:`mmbiformer.ops.auto_grid`, and where the map has fewer than ``topk``
            tokens all of them are attended to. Defaults to 7.
        lepe_kernel: Side of the LePE kernel, in tokens. Defaults to 5.
        padding: ``'input'``, ``'projected'`` or ``'mask'``. Defaults to ``'input'``.
        backend: Backend of :func:`mmbiformer.ops.routed_attention`. Defaults to ``'auto'``.

    Raises:
        ValueError: If ``dim`` is no multiple of ``num_heads``, a number is not positive or
            ``padding`` or ``backend`` is unknown. In ``forward``, under ``'projected'``: if the map
            is smaller than the grid, or has fewer regions than ``topk``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        topk: int,
        region_grid: int | tuple[int, int] | str = 7,
        lepe_kernel: int = 5,
        padding: str = 'input',
        backend: str = 'auto',
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'dim={dim} must be a multiple of num_heads={num_heads}')
        if lepe_kernel < 1 or lepe_kernel % 2 == 0:
            raise ValueError(f'lepe_kernel={lepe_kernel} must be an odd number of tokens')
        if padding not in PADDINGS:
            raise ValueError(f'padding={padding!r} is unknown; choose one of {list(PADDINGS)}')
        check_backend(backend)
        self.region_grid = to_grid(region_grid)
        # Under 'projected' a map can have more regions than the grid says; forward checks then.
        if topk < 1 or padding != 'projected':
            check_topk(topk, self.region_grid)
        self.num_heads = num_heads
        self.topk = topk
        self.padding = padding
        self.backend = backend
        self.scale = dim**-0.5
        self.qkv = Linear(dim, 3 * dim)
        self.lepe = DepthwiseConv2d(dim, lepe_kernel)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: Map of shape (B, H, W, C).

        Returns:
            Tensor: (B, H, W, C).
        """
        height, width = x.shape[1:3]
        auto = isinstance(self.region_grid, str)  # torch 2.4 compiles no comparison with a tuple
        rows, cols = auto_grid((height, width), self.topk) if auto else self.region_grid
        if self.padding == 'projected':
            if height < rows or width < cols:
                raise ValueError(
                    f'a {height}x{width} map is smaller than the {rows}x{cols} region grid, which '
                    f"padding='projected' cannot divide; use a larger input, a coarser "
                    f"region_grid, or padding='input' or 'mask'"
                )
            region_size = height // rows, width // cols
        else:
            region_size = ceil_div(height, rows), ceil_div(width, cols)
        if self.padding == 'input':
            x = pad_to(x, rows * region_size[0], cols * region_size[1])

        qkv = self.qkv(x)
        q, k, v = qkv.chunk(3, dim=-1)
        topk = self.topk
        if auto or self.padding == 'mask':  # a small map has fewer regions
            topk = min(topk, math.prod(num_regions((height, width), region_size)))
        routes = route_regions(q, k, topk, region_size)
        lepe = self.lepe(v)
        if self.padding == 'projected':
            regions = num_regions((height, width), region_size)
            qkv = pad_to(qkv, regions[0] * region_size[0], regions[1] * region_size[1])
            q, k, v = qkv.chunk(3, dim=-1)
        out = routed_attention(
            q,
            k,
            v,
            routes,
            num_heads=self.num_heads,
            region_size=region_size,
            scale=self.scale,
            backend=self.backend,
        )
        if self.padding == 'projected':
            out = crop(out, height, width)
        # Cropping before the projection saves it the padded tokens; they never mix.
        return self.proj(crop(add(out, lepe), height, width))

    def extra_repr(self) -> str:
        return (
            f'num_heads={self.num_heads}, topk={self.topk}, region_grid={self.region_grid!r}, '
            f'padding={self.padding!r}'
        )


def to_grid(region_grid: int | tuple[int, int] | str) -> tuple[int, int] | str:
    """Regions per column and per row from an int or a pair, ``'auto'`` as it is.

    Raises ValueError for anything else.
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
    """Raise ValueError unless so many regions can be chosen from a grid; ``'auto'`` has enough."""
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
