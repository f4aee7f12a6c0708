"""Bi-directional cross-attention of latents and a map's tokens: the core of BiXT."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import bidirectional_attention, check_bidirectional_backend
from .linear import Linear


class BidirectionalCrossAttention(nn.Module):
    """Latents and tokens attend to each other by one matrix of scores (BiXT, section 3.2).

    Each side has a reference and a value. With one side alone it is plain cross-attention, and the
    other side's output projection is not built.

    Args:
        dim: Channels of latents and tokens, C.
        num_heads: Number of heads.
        to_latents: Whether the latents gather from the tokens. Defaults to True.
        to_tokens: Whether the tokens gather from the latents. Defaults to True.
        backend: Backend of :func:`mmbiformer.ops.bidirectional_attention`. Defaults to ``'auto'``.

    Raises:
        ValueError: If ``dim`` is not a multiple of ``num_heads``, if neither side gathers, or if
            the backend is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        to_latents: bool = True,
        to_tokens: bool = True,
        backend: str = 'auto',
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'dim={dim} must be a multiple of num_heads={num_heads}')
        if not to_latents and not to_tokens:
            raise ValueError('to_latents or to_tokens must be True')
        check_bidirectional_backend(backend)
        self.num_heads = num_heads
        self.backend = backend
        self.to_latents, self.to_tokens = to_latents, to_tokens
        if to_tokens:
            self.rv_latents = Linear(dim, 2 * dim)
            self.proj_tokens = Linear(dim, dim)
        else:
            self.r_latents = Linear(dim, dim)
        # Whole even if only the tokens gather, so that it fits the weights trained with both.
        self.rv_tokens = Linear(dim, 2 * dim)
        if to_latents:
            self.proj_latents = Linear(dim, dim)

    def forward(self, latents: Tensor, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Attend.

        Args:
            latents: (B, N, C).
            tokens: Map of shape (B, H, W, C).

        Returns:
            tuple[Tensor | None, Tensor | None]: What the latents gather, (B, N, C), and what the
            tokens gather, (B, H, W, C); None for a side that does not.
        """
        token_r, token_v = self.rv_tokens(tokens).flatten(1, 2).chunk(2, -1)
        if not self.to_tokens:
            return self.proj_latents(self._attend(self.r_latents(latents), token_r, token_v)), None
        latent_r, latent_v = self.rv_latents(latents).chunk(2, -1)
        if not self.to_latents:
            out = self._attend(token_r, latent_r, latent_v)
            return None, self.proj_tokens(out.view(tokens.shape))
        to_latents, to_tokens = bidirectional_attention(
            latent_r, latent_v, token_r, token_v, num_heads=self.num_heads, backend=self.backend
        )
        return self.proj_latents(to_latents), self.proj_tokens(to_tokens.view(tokens.shape))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One side alone."""
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}'
