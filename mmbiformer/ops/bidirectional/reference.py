"""The specification of bi-directional cross-attention; read it beside the paper's section 3.2."""

from torch import Tensor


def why_not(
    latent_r: Tensor, latent_v: Tensor, token_r: Tensor, token_v: Tensor, num_heads: int
) -> str | None:
    """The reference runs anything, anywhere."""
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
        x.unflatten(2, (num_heads, -1)).transpose(1, 2)
        for x in (latent_r, latent_v, token_r, token_v)
    )
    logits = scale * latent_r @ token_r.mT  # (B, heads, N, L): the one score matrix
    latents = logits.softmax(-1) @ token_v
    tokens = logits.mT.softmax(-1) @ latent_v
    return tuple(x.transpose(1, 2).flatten(2) for x in (latents, tokens))
