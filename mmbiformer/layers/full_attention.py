"""Full attention with LePE: BiFormer's last stage."""

import torch.nn.functional as F
from torch import Tensor, nn

from .conv import DepthwiseConv2d
from .inplace import add
from .linear import Linear


class FullAttention(nn.Module):
    """Attention among all tokens, with LePE (the authors' ``AttentionLePE``).

    The depthwise convolution is named after what it reads: ``lepe`` reads the input and
    ``value_lepe`` the values. So weights trained one way never load into a model of the other.

    Args:
        dim: Channels, C.
        num_heads: Number of heads. Defaults to 8, which the released models have at any width.
        lepe_source: What the LePE convolves: ``'input'``, as in BiFormer-T, -S, -B and -STL, or
            ``'value'``, as in BiFormer-STL-nchw and the paper. Defaults to ``'input'``.

    Raises:
        ValueError: If ``dim`` is not a multiple of ``num_heads`` or ``lepe_source`` is unknown.
    """

    def __init__(self, dim: int, num_heads: int = 8, lepe_source: str = 'input') -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'dim={dim} must be a multiple of num_heads={num_heads}')
        if lepe_source not in ('input', 'value'):
            raise ValueError(f"lepe_source={lepe_source!r} must be 'input' or 'value'")
        self.num_heads = num_heads
        self.lepe_source = lepe_source
        self.qkv = Linear(dim, 3 * dim, bias=False)
        if lepe_source == 'input':
            self.lepe = DepthwiseConv2d(dim, 5)
        else:
            self.value_lepe = DepthwiseConv2d(dim, 5)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: Map of shape (B, H, W, C).

        Returns:
            Tensor: (B, H, W, C).
        """
        qkv = self.qkv(x)
        if self.lepe_source == 'input':
            lepe = self.lepe(x)
        else:
            lepe = self.value_lepe(qkv.chunk(3, dim=-1)[2])
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, H * W, C / heads)
        return self.proj(add(out.transpose(1, 2).reshape_as(x), lepe))

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}'
