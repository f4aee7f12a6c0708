"""The published formulations of attention, re-expressed; only the benchmarks use them.

Keys and values are gathered from a map that is expanded to every query region. Logits,
probabilities and position biases are written to memory in full. Copies turn maps into regions and
back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbiformer.layers import BiLevelRoutingAttention, DeformableAgentAttention, FullAttention
from mmbiformer.models import BiFormer, DeBiFormer
from mmbiformer.ops.regions import pad_to


def gather_attention(q: Tensor, kv: Tensor, routes: Tensor, heads: int, scale: float) -> Tensor:
    """Attention of regions to gathered copies of keys and values.

    Args:
        q: (B, R, Tq, C).
        kv: (B, R, T, 2 * C), keys and values side by side.
        routes: (B, R, k).
        heads: Number of heads.
        scale: Factor on the queries.

    Returns:
        Tensor: (B, R, Tq, C).
    """
    batch, regions, _, dim = q.shape
    kv = kv[:, None].expand(-1, regions, -1, -1, -1)
    index = routes[..., None, None].expand(-1, -1, -1, *kv.shape[3:])
    k, v = torch.gather(kv, 2, index).flatten(2, 3).flatten(0, 1).split([dim, dim], -1)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q.flatten(0, 1), k, v))
    out = ((q * scale) @ k.mT.contiguous()).softmax(-1) @ v.contiguous()
    return out.transpose(1, 2).reshape(batch, regions, -1, dim)


def route(q: Tensor, kv: Tensor, topk: int) -> Tensor:
    """Routes (B, R, k) by the means of the regions' queries and keys."""
    affinity = q.mean(2).detach() @ kv[..., : q.shape[3]].mean(2).detach().mT
    return affinity.topk(topk, -1).indices


class GatherAttention(nn.Module):
    """The published attention with the parameters of one of our layers.

    Args:
        layer: Layer to take the parameters of, of padding ``'input'``.
    """

    def __init__(self, layer: BiLevelRoutingAttention) -> None:
        super().__init__()
        self.layer = layer
        self.qkv = as_linear(layer.qkv)
        self.proj = as_linear(layer.proj)

    def forward(self, x: Tensor) -> Tensor:
        layer, (height, width), grid = self.layer, x.shape[1:3], self.layer.region_grid
        x = pad_to_grid(x, grid)
        size, dim = x.shape[1:3], x.shape[3]
        q, kv = self.qkv(to_regions(x, grid)).split([dim, 2 * dim], -1)
        v = to_map(kv[..., dim:], grid, size).permute(0, 3, 1, 2).contiguous()
        lepe = F.conv2d(
            v, layer.lepe.weight, layer.lepe.bias, padding=layer.lepe.padding, groups=dim
        )
        routes = route(q, kv, layer.router.topk)
        out = gather_attention(q, kv, routes, layer.num_heads, layer.scale)
        out = self.proj(to_map(out, grid, size) + lepe.permute(0, 2, 3, 1))
        return out[:, :height, :width].contiguous()


class PlainAgentAttention(nn.Module):
    """The published deformable agent attention with the parameters of one of our layers.

    Args:
        layer: Layer to take the parameters of, of padding ``'input'``.
    """

    def __init__(self, layer: DeformableAgentAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, (height, width), grid = self.layer, x.shape[1:3], self.layer.region_grid
        heads, groups = layer.num_heads, layer.num_groups
        x = pad_to_grid(x, grid)
        batch, *size, dim = x.shape
        q, k, v = layer.qkv(x).chunk(3, -1)
        positions = layer._positions(q)
        agents, lepe = layer._sample(x, positions), layer.lepe(v)
        agents, lepe, positions = (pad_to_grid(each, grid) for each in (agents, lepe, positions))

        kv = to_regions(torch.cat([k, v], -1), grid)
        agent_q = to_regions(layer.agent_query(agents), grid)
        routes = route(agent_q, kv, layer.router.topk)
        out = gather_attention(agent_q, kv, routes, heads, layer.scale)
        agents = agents + layer.agent_proj(to_map(out, grid, agents.shape[1:3]) + lepe)
        agents = layer.agent_norm2(agents + layer.agent_mlp(layer.agent_norm1(agents)))

        k, v = (f(agents).flatten(1, 2) for f in (layer.agent_key, layer.agent_value))
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q.flatten(1, 2), k, v))
        logits = (q @ k.mT).mul(layer.scale)
        tokens = (torch.linspace(-1, 1, n, dtype=positions.dtype) for n in size)
        tokens = torch.meshgrid(*tokens, indexing='ij')
        tokens = torch.stack(tokens, -1).view(1, 1, -1, 1, 2)
        positions = positions.flatten(1, 2).unflatten(-1, (groups, 2)).transpose(1, 2)[:, :, None]
        table = layer.rpe_table.expand(batch, -1, -1, -1).reshape(
            -1, heads // groups, *layer.rpe_table.shape[1:]
        )
        grid = (tokens - positions).mul(0.5).flatten(0, 1)[..., (1, 0)]
        bias = F.grid_sample(table, grid, align_corners=True).view_as(logits)
        out = (logits + bias).softmax(-1) @ v
        out = layer.proj(out.transpose(1, 2).reshape(batch, *size, dim))
        return out[:, :height, :width].contiguous()


def pad_to_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Zero-pad a map at the right and bottom to multiples of the grid."""
    return pad_to(x, *(-(-n // parts) * parts for n, parts in zip(x.shape[1:3], grid, strict=True)))


def to_regions(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Map (B, H, W, C) to regions (B, R, T, C)."""
    x = x.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def to_map(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Regions (B, R, T, C) to a map (B, H, W, C)."""
    x = x.unflatten(2, (size[0] // grid[0], -1)).unflatten(1, grid).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


class PlainFullAttention(nn.Module):
    """Full attention with logits and probabilities written out.

    Args:
        layer: Layer to take the parameters of.
    """

    def __init__(self, layer: FullAttention) -> None:
        super().__init__()
        self.layer = layer
        self.qkv = as_linear(layer.qkv)
        self.proj = as_linear(layer.proj)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        tokens = x.flatten(1, 2)
        lepe = layer.lepe(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
        q, k, v = self.qkv(tokens).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape_as(x) + lepe)


def as_linear(layer: nn.Linear) -> nn.Linear:
    """The same parameters in a plain ``nn.Linear``."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def gather_baseline(net: BiFormer | DeBiFormer) -> BiFormer | DeBiFormer:
    """Turn a backbone into the baseline, in place.

    Args:
        net: BiFormer of arch ``'tiny'``, ``'small'`` or ``'base'``, or a DeBiFormer.

    Returns:
        BiFormer | DeBiFormer: The same parameters and the same outputs, computed in the published
        way.
    """
    published = {
        BiLevelRoutingAttention: GatherAttention,
        DeformableAgentAttention: PlainAgentAttention,
        FullAttention: PlainFullAttention,
    }
    for stage in net.stages:
        for block in stage:
            block.attn = published[type(block.attn)](block.attn)
            if isinstance(net, BiFormer):  # DeBiFormer's MLPs are published as convolutions
                block.mlp.fc1, block.mlp.fc2 = as_linear(block.mlp.fc1), as_linear(block.mlp.fc2)
    return net
