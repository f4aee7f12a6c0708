"""Full attention with LePE: BiFormer's last stage."""

import torch.nn.functional as F
from torch import Tensor, nn

from .conv import DepthwiseConv2d
from .inplace import add
from .linear import Linear


class FullAttention(nn.Module):
    """Attention among all tokens, with LePE (the authors' ``AttentionLePE``).

    Args:
        dim: Channels, C.
        num_heads: Number of heads. Defaults to 8, which the released models have at any width.
        lepe_source: What the LePE convolves: ``'input'``, as in BiFormer-T, -S, -B and -STL, or
            ``'value'``, as in BiFormer-STL-nchw and the paper. Defaults to ``'input'``.

    Raises:
        ValueError: If ``dim`` is no multiple of ``num_heads`` or ``lepe_source`` is unknown.
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
        self.lepe = DepthwiseConv2d(dim, 5)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: Map of shape (B, H, W, C).

        Returns:
            Tensor: (B, H, W, C).
        """
        qkv = self.qkv(x)
        lepe = self.lepe(x if self.lepe_source == 'input' else qkv.chunk(3, dim=-1)[2])
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, H * W, C / heads)
        return self.proj(add(out.transpose(1, 2).reshape_as(x), lepe))

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, lepe_source={self.lepe_source!r}'
