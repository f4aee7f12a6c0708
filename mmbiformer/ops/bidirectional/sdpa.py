"""Bi-directional cross-attention as two calls of PyTorch's attention: runs anywhere."""

import torch.nn.functional as F
from torch import Tensor


def why_not(
    latent_r: Tensor, latent_v: Tensor, token_r: Tensor, token_v: Tensor, num_heads: int
) -> str | None:
    """PyTorch's attention runs anything, anywhere."""
    return None


def attend(
    latent_r: Tensor,
    latent_v: Tensor,
    token_r: Tensor,
    token_v: Tensor,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`mmbiformer.ops.bidirectional_attention`."""
    latent_r, latent_v, token_r, token_v = (
        # PyTorch's kernel on CPU assumes adjacent channels.
        (x if x.stride(-1) == 1 else x.contiguous()).unflatten(2, (num_heads, -1)).transpose(1, 2)
        for x in (latent_r, latent_v, token_r, token_v)
    )
    latents = F.scaled_dot_product_attention(latent_r, token_r, token_v, scale=scale)
    tokens = F.scaled_dot_product_attention(token_r, latent_r, latent_v, scale=scale)
    return tuple(x.transpose(1, 2).flatten(2) for x in (latents, tokens))
