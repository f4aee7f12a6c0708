"""BiXT as published, re-expressed; only the benchmarks use it.

Scores and both softmaxes are written to memory in full, and linear layers are PyTorch's.
"""

from timm.layers import Attention
from torch import Tensor, nn

from benchmarks.gather_baseline import as_linear
from mmbiformer.layers import BidirectionalCrossAttention, Linear
from mmbiformer.models import BiXT


class PlainCrossAttention(nn.Module):
    """The published bi-directional attention with the parameters of one of our layers.

    Args:
        layer: Layer to take the parameters of.
    """

    def __init__(self, layer: BidirectionalCrossAttention) -> None:
        super().__init__()
        self.num_heads = layer.num_heads
        for name, part in layer.named_children():
            self.add_module(name, as_linear(part))

    def forward(self, latents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        token_r, token_v = self._by_head(self.rv_tokens(tokens.flatten(1, 2)), 2)
        if not hasattr(self, 'rv_latents'):
            (latent_r,) = self._by_head(self.r_latents(latents), 1)
        else:
            latent_r, latent_v = self._by_head(self.rv_latents(latents), 2)
        scores = (latent_r @ token_r.mT) * latent_r.shape[-1] ** -0.5
        gathered = scores.softmax(-1) @ token_v
        latents = self.proj_latents(gathered.transpose(1, 2).flatten(2))
        if not hasattr(self, 'rv_latents'):
            return latents, None
        gathered = scores.mT.softmax(-1) @ latent_v
        return latents, self.proj_tokens(gathered.transpose(1, 2).reshape(tokens.shape))

    def _by_head(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts * C) to parts of (B, heads, N, C / heads)."""
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def bixt_baseline(net: BiXT) -> BiXT:
    """Turn a BiXT with both sides into the baseline, in place.

    Args:
        net: A BiXT that gives latents.

    Returns:
        BiXT: The same parameters and the same outputs, computed in the published way.
    """
    for module in [*net.modules()]:
        for name, part in module.named_children():
            if isinstance(part, BidirectionalCrossAttention):
                module.add_module(name, PlainCrossAttention(part))
            elif isinstance(part, Linear):
                module.add_module(name, as_linear(part))
            elif isinstance(part, Attention):
                part.fused_attn = False
    return net
