"""BiFormer with the published formulation of its attention, re-expressed, as a baseline only.

Keys and values are gathered from a map expanded to every query region, and logits and probabilities
are written out; region by region layouts are made and unmade by copies.
"""

import torch
from torch import Tensor, nn

from mmbiformer.layers import BiLevelRoutingAttention, FullAttention
from mmbiformer.models import BiFormer


class GatherAttention(nn.Module):
    """The published attention with the parameters of one of our layers; maps must be divisible.

    Args:
        layer: Layer to take the parameters of.
    """

    def __init__(self, layer: BiLevelRoutingAttention) -> None:
        super().__init__()
        self.layer = layer
        self.qkv = as_linear(layer.qkv)
        self.proj = as_linear(layer.proj)

    def forward(self, x: Tensor) -> Tensor:
        layer, heads, topk = self.layer, self.layer.num_heads, self.layer.topk
        batch, height, width, dim = x.shape
        rows, cols = layer.region_grid
        h, w, regions = height // rows, width // cols, rows * cols

        x = x.view(batch, rows, h, cols, w, dim).transpose(2, 3).reshape(batch, regions, h, w, dim)
        q, kv = self.qkv(x).split([dim, 2 * dim], -1)
        v = kv[..., dim:].view(batch, rows, cols, h, w, dim).permute(0, 5, 1, 3, 2, 4)
        v = v.reshape(batch, dim, height, width)
        lepe = nn.functional.conv2d(
            v, layer.lepe.weight, layer.lepe.bias, padding=layer.lepe.padding, groups=dim
        )
        affinity = q.mean((2, 3)).detach() @ kv[..., :dim].mean((2, 3)).detach().mT
        routes = affinity.topk(topk, -1).indices

        kv = kv.flatten(2, 3)[:, None].expand(-1, regions, -1, -1, -1)
        index = routes[..., None, None].expand(-1, -1, -1, *kv.shape[3:])
        k, v = torch.gather(kv, 2, index).split([dim, dim], -1)
        q = q.reshape(batch * regions, h * w, heads, -1).transpose(1, 2)
        k = k.reshape(batch * regions, topk * h * w, heads, -1).permute(0, 2, 3, 1)
        v = v.reshape(batch * regions, topk * h * w, heads, -1).transpose(1, 2)
        out = ((q * layer.scale) @ k).softmax(-1) @ v
        out = out.transpose(1, 2).reshape(batch, rows, cols, h, w, dim).transpose(2, 3)
        out = out.reshape(batch, height, width, dim)
        return self.proj(out + lepe.permute(0, 2, 3, 1))


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


def gather_baseline(net: BiFormer) -> BiFormer:
    """Turn a backbone into the baseline, in place.

    Args:
        net: Backbone of arch ``'tiny'``, ``'small'`` or ``'base'``.

    Returns:
        BiFormer: The same parameters, the same numbers, the published way to compute them.
    """
    for stage in net.stages:
        for block in stage:
            routed = isinstance(block.attn, BiLevelRoutingAttention)
            block.attn = (GatherAttention if routed else PlainFullAttention)(block.attn)
            block.mlp.fc1, block.mlp.fc2 = as_linear(block.mlp.fc1), as_linear(block.mlp.fc2)
    return net
