"""Deformable agent attention: a few agents sample the map, and all tokens attend to them."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import agent_attention, auto_grid, check_backend, routed_attention
from ..ops.regions import ceil_div, crop
from ..ops.tracing import with_symbols
from .conv import DepthwiseConv2d
from .grid import check_padding, check_topk, pad_to_grid, region_size, to_grid
from .linear import Linear
from .mlp import ConvMLP
from .router import RegionRouter


class DeformableAgentAttention(nn.Module):
    """Deformable agent bi-level routing attention (DeBiFormer, section 3).

    Agents start from a coarse grid, and a small network computes their offsets from the queries.
    They sample the input at their new positions. Then they are the queries of bi-level routing
    attention: regions of agents are routed to regions of the map. An MLP follows. At last every
    token of the map attends to all agents, with a bias by relative position. This is the released
    code's behaviour; :class:`mmbiformer.models.DeBiFormer` explains the quirks that comments name.

    ``grid_sample``, which samples the agents, has no deterministic backward pass on CUDA, so
    PyTorch refuses it there under ``torch.use_deterministic_algorithms(True)``. Every other step
    has one.

    Args:
        dim: Channels, C.
        num_heads: Number of attention heads.
        topk: Regions of the map that each region of agents is routed to.
        num_groups: Groups of channels; agents have a position for each group.
        stride: Tokens per agent along each side.
        offset_kernel: Side of the offset network's kernel, in tokens.
        table_size: Side of the query map that the bias table fits, in tokens, at least 2.
        mlp_ratio: Hidden width of the agents' MLP, in multiples of ``dim``. Defaults to 3.
        region_grid: Regions per column and per row, of agents as well as of the map, an int or a
            pair. ``'auto'`` chooses a grid for each map by :func:`mmbiformer.ops.auto_grid`, never
            finer than the agents. Defaults to 7.
        padding: ``'input'`` or ``'mask'``, see :class:`BiLevelRoutingAttention`. Under ``'mask'``
            agents are not padded. Under ``'mask'`` or with ``region_grid='auto'``, a map with fewer
            than ``topk`` regions is routed to all of them. Defaults to ``'input'``.
        backend: Backend of :func:`mmbiformer.ops.routed_attention`. Defaults to ``'auto'``.

    Raises:
        ValueError: If ``dim`` is not a multiple of the heads or the heads not of the groups, if a
            number is too small, if ``topk`` exceeds the regions of the grid, or if ``padding`` or
            ``backend`` is unknown.

    Attributes:
        router (RegionRouter): The module that chooses the routes; a forward hook on it sees them.

    Example:
        >>> attention = DeformableAgentAttention(
        ...     dim=64, num_heads=2, topk=4, num_groups=1, stride=8, offset_kernel=9, table_size=56
        ... )
        >>> attention(torch.randn(2, 56, 56, 64)).shape
        torch.Size([2, 56, 56, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        topk: int,
        num_groups: int,
        stride: int,
        offset_kernel: int,
        table_size: int,
        mlp_ratio: float = 3,
        region_grid: int | tuple[int, int] | str = 7,
        padding: str = 'input',
        backend: str = 'auto',
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads or num_groups < 1 or num_heads % num_groups:
            raise ValueError(
                f'dim={dim} must be a multiple of num_heads={num_heads}, and num_heads a multiple '
                f'of num_groups={num_groups}'
            )
        if offset_kernel < 1 or offset_kernel % 2 == 0:
            raise ValueError(f'offset_kernel={offset_kernel} must be an odd number of tokens')
        if stride < 1 or table_size < 2:
            raise ValueError(f'stride={stride} must be positive, table_size={table_size} 2 or more')
        check_padding(padding, ('input', 'mask'))
        check_backend(backend)
        self.region_grid = to_grid(region_grid)
        check_topk(topk, self.region_grid)
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.stride = stride
        self.padding = padding
        self.backend = backend
        self.scale = dim**-0.5  # quirk "whole-width scale"
        group_dim = dim // num_groups
        self.qkv = Linear(dim, 3 * dim)
        self.offset = nn.Sequential(
            OrderedDict(
                conv=DepthwiseConv2d(group_dim, offset_kernel, stride, bias=False),
                norm=nn.LayerNorm(group_dim),
                act=nn.GELU(),
                head=nn.Linear(group_dim, 1, bias=False),
            )
        )
        self.agent_query = Linear(dim, dim)
        self.router = RegionRouter(topk, padding == 'mask' or self.region_grid == 'auto')
        self.lepe = DepthwiseConv2d(dim, 5, stride)
        self.agent_proj = Linear(dim, dim)
        self.agent_norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.agent_mlp = ConvMLP(dim, int(mlp_ratio * dim))
        self.agent_norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.agent_key = Linear(dim, dim)
        self.agent_value = Linear(dim, dim)
        self.rpe_table = nn.Parameter(torch.empty(num_heads, *(2 * table_size - 1,) * 2))
        nn.init.trunc_normal_(self.rpe_table, std=0.01)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: Map of shape (B, H, W, C).

        Returns:
            Tensor: (B, H, W, C).
        """
        height, width = x.shape[1:3]
        grid = self._grid(height, width)
        if self.padding == 'input':
            x = pad_to_grid(x, grid)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        positions = self._positions(q)
        agents, lepe = self._sample(x, positions), self.lepe(v)  # quirk "sampled input"
        if self.padding == 'input':
            # Quirk "visible padding".
            agents, lepe, positions = (pad_to_grid(x, grid) for x in (agents, lepe, positions))

        agents = agents + self.agent_proj(self._route(self.agent_query(agents), k, v, grid) + lepe)
        agents = agents + self.agent_mlp(self.agent_norm1(agents))
        agents = self.agent_norm2(agents).flatten(1, 2)

        # Cropped before the attention, which works token by token.
        out = agent_attention(
            crop(q, height, width),
            self.agent_key(agents),
            self.agent_value(agents),
            positions.flatten(1, 2).unflatten(-1, (self.num_groups, 2)).transpose(1, 2),
            self.rpe_table,
            rows=span(x.shape[1], height, positions),
            columns=span(x.shape[2], width, positions),
            scale=self.scale,
        )
        return self.proj(out)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Regions per column and per row of a map of height x width tokens."""
        if self.region_grid != 'auto':
            return self.region_grid
        agents = ceil_div(height, self.stride), ceil_div(width, self.stride)
        return auto_grid(agents, self.router.topk, (height, width))

    def _positions(self, q: Tensor) -> Tensor:
        """The agents' positions, down and to the right: (B, H, W, C) to (B, Ha, Wa, G * 2)."""
        q = q.unflatten(-1, (self.num_groups, -1)).movedim(3, 1)
        offset = self.offset(q.flatten(0, 1)).unflatten(0, q.shape[:2])  # (B, G, Ha, Wa, 1)
        # Half precision could not tell the tokens of a large map apart.
        offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
        centres = (
            (torch.arange(n, dtype=offset.dtype, device=q.device) + 0.5) * (2 / n) - 1
            for n in offset.shape[2:4]
        )  # quirk "mixed corners"
        start = torch.stack(torch.meshgrid(*centres, indexing='ij'), dim=-1)  # (Ha, Wa, 2)
        # Quirks "one offset", which is added to both coordinates, and "raw offset".
        return (start + offset).clamp(-1, 1).movedim(1, 3).flatten(3)

    def _sample(self, x: Tensor, positions: Tensor) -> Tensor:
        """Read the map at the agents' positions: (B, H, W, C) to (B, Ha, Wa, C)."""
        groups = self.num_groups
        maps = x.to(positions.dtype).permute(0, 3, 1, 2).unflatten(1, (groups, -1))
        grid = positions.unflatten(-1, (groups, 2)).movedim(3, 1).flip(-1)  # x before y
        agents = F.grid_sample(maps.flatten(0, 1), grid.flatten(0, 1), align_corners=True)
        agents = agents.unflatten(0, (x.shape[0], groups)).flatten(1, 2).permute(0, 2, 3, 1)
        return agents.to(x.dtype).contiguous()

    def _route(self, agents: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Bi-level routing attention of the agents to the map."""
        agent_region = region_size(agents.shape[1:3], grid)
        key_region = region_size(k.shape[1:3], grid)
        routes = self.router(agents, k, agent_region, key_region)
        return routed_attention(
            agents,
            k,
            v,
            routes,
            num_heads=self.num_heads,
            region_size=agent_region,
            key_region_size=key_region,
            scale=self.scale,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f'num_heads={self.num_heads}, num_groups={self.num_groups}, '
            f'region_grid={self.region_grid!r}, padding={self.padding!r}'
        )


def span(steps: int, count: int, like: Tensor) -> Tensor:
    """The first ``count`` of ``steps`` numbers from -1 to 1, both included; -1 if steps is 1."""
    # Not torch.linspace, which would fix the size of exported graphs.
    most = torch.sym_max(steps - 1, 1) if with_symbols() else max(steps - 1, 1)
    return torch.arange(count, dtype=like.dtype, device=like.device) * (2 / most) - 1
