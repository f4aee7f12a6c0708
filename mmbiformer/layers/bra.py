"""Bi-level routing attention as a layer."""

from torch import Tensor, nn

from ..ops import auto_grid, check_backend, num_regions, routed_attention
from ..ops.regions import crop, pad_to
from .conv import DepthwiseConv2d
from .grid import check_padding, check_topk, pad_to_grid, region_size, to_grid
from .inplace import add
from .linear import Linear
from .router import RegionRouter


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention, BRA (BiFormer, section 3.2; the authors' ``ops/bra_legacy.py``).

    A grid cuts the map into regions. Each region is routed to the ``topk`` regions of the highest
    affinity, and each token attends to all tokens there. A depthwise 5x5 convolution of the values
    (LePE) is added before the output projection. The logits are scaled by ``dim ** -0.5``: by the
    whole width, as in the released models, not by the head's.

    If the sides of a map are not multiples of the grid, ``padding`` says what happens:

    - ``'input'``: the input is zero-padded at the right and bottom to a multiple of the grid
      before it is projected. Padded tokens carry the projection's bias, count in the region means
      and are attended to. BiFormer-T, -S, -B and -STL were trained and released so.
    - ``'projected'``: regions measure floor(H / grid) x floor(W / grid) tokens, so there can be
      more of them than the grid says. Queries, keys and values are zero-padded, and padded keys
      (logit 0, value 0) are attended to. Region means exclude them. BiFormer-STL-nchw was
      released so (the authors' ``ops/bra_nchw.py``).
    - ``'mask'``: regions measure ceil(H / grid) x ceil(W / grid) tokens and end at the edge of the
      map. Nothing outside counts or is attended to. There can be fewer regions than the grid says;
      if there are fewer than ``topk``, all of them are attended to.

    Args:
        dim: Channels, C.
        num_heads: Number of attention heads.
        topk: Regions each region is routed to.
        region_grid: Regions per column and per row, an int or a pair. ``'auto'`` chooses a grid
            for each map by :func:`mmbiformer.ops.auto_grid`; a map with fewer than ``topk`` tokens
            then attends to all of them. Defaults to 7.
        padding: ``'input'``, ``'projected'`` or ``'mask'``. Defaults to ``'input'``.
        backend: Backend of :func:`mmbiformer.ops.routed_attention`. Defaults to ``'auto'``.

    Raises:
        ValueError: If ``dim`` is not a multiple of ``num_heads``, if a number is not positive, or
            if ``padding`` or ``backend`` is unknown. In ``forward``, under ``'projected'``: if the
            map is smaller than the grid, or has fewer regions than ``topk``.

    Attributes:
        router (RegionRouter): The module that chooses the routes; a forward hook on it sees them.

    Example:
        >>> attention = BiLevelRoutingAttention(dim=64, num_heads=2, topk=4)
        >>> attention(torch.randn(2, 56, 56, 64)).shape
        torch.Size([2, 56, 56, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        topk: int,
        region_grid: int | tuple[int, int] | str = 7,
        padding: str = 'input',
        backend: str = 'auto',
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'dim={dim} must be a multiple of num_heads={num_heads}')
        check_padding(padding)
        check_backend(backend)
        self.region_grid = to_grid(region_grid)
        # Under 'projected' a map can have more regions than the grid; forward checks topk then.
        if topk < 1 or padding != 'projected':
            check_topk(topk, self.region_grid)
        self.num_heads = num_heads
        self.padding = padding
        self.backend = backend
        self.scale = dim**-0.5
        self.qkv = Linear(dim, 3 * dim)
        self.router = RegionRouter(topk, padding == 'mask' or self.region_grid == 'auto')
        self.lepe = DepthwiseConv2d(dim, 5)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: Map of shape (B, H, W, C).

        Returns:
            Tensor: (B, H, W, C).
        """
        height, width = x.shape[1:3]
        grid = self.region_grid
        if grid == 'auto':
            grid = auto_grid((height, width), self.router.topk)
        if self.padding == 'projected':
            size = self._rounded_down(height, width, grid)
        else:
            size = region_size((height, width), grid)
        if self.padding == 'input':
            x = pad_to_grid(x, grid)

        qkv = self.qkv(x)
        q, k, v = qkv.chunk(3, dim=-1)
        routes = self.router(q, k, size)
        lepe = self.lepe(v)
        if self.padding == 'projected':
            rows, cols = num_regions((height, width), size)
            q, k, v = pad_to(qkv, rows * size[0], cols * size[1]).chunk(3, dim=-1)
        out = routed_attention(
            q,
            k,
            v,
            routes,
            num_heads=self.num_heads,
            region_size=size,
            scale=self.scale,
            backend=self.backend,
        )
        if self.padding == 'projected':
            out = crop(out, height, width)
        # Cropped before the projection, which works token by token.
        return self.proj(crop(add(out, lepe), height, width))

    def _rounded_down(self, height: int, width: int, grid: tuple[int, int]) -> tuple[int, int]:
        """The region size under ``'projected'``."""
        rows, cols = grid
        if height < rows or width < cols:
            raise ValueError(
                f'a {height}x{width} map is smaller than the {rows}x{cols} region grid, which '
                f"padding='projected' cannot divide; use a larger input, a coarser region_grid, or "
                f"padding='input' or 'mask'"
            )
        return height // rows, width // cols

    def extra_repr(self) -> str:
        return (
            f'num_heads={self.num_heads}, region_grid={self.region_grid!r}, '
            f'padding={self.padding!r}'
        )
