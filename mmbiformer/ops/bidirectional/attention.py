"""The public bi-directional cross-attention: checks and choice of backend."""

from torch import Tensor

from ..choice import as_number, check_name, choose
from . import cpp, reference, sdpa

BIDIRECTIONAL_BACKENDS = {'cpp': cpp, 'sdpa': sdpa, 'reference': reference}
"""Implementations, the preferred one first."""


def bidirectional_attention(
    latent_r: Tensor,
    latent_v: Tensor,
    token_r: Tensor,
    token_v: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
    backend: str = 'auto',
) -> tuple[Tensor, Tensor]:
    """Let latents and tokens attend to each other by one matrix of scores (BiXT, section 3.2).

    The score of a latent and a token is ``scale`` times the product of their references. Its
    softmax over the tokens weighs the tokens' values for the latents. Its softmax over the latents
    weighs the latents' values for the tokens. Time and memory grow linearly with the tokens.
    Tensors may be slices of a packed projection.

    Example:
        >>> latents, tokens = torch.randn(2, 64, 192), torch.randn(2, 784, 192)
        >>> pair = bidirectional_attention(latents, latents, tokens, tokens, num_heads=6)
        >>> [tuple(each.shape) for each in pair]
        [(2, 64, 192), (2, 784, 192)]

    Args:
        latent_r: The latents' references, (B, N, C).
        latent_v: The latents' values, (B, N, Cv).
        token_r: The tokens' references, (B, L, C).
        token_v: The tokens' values, (B, L, Cv).
        num_heads: Number of heads; C and Cv must be multiples of it.
        scale: Factor on the scores. Defaults to None, (C / num_heads) ** -0.5.
        backend: ``'auto'`` takes the first backend that can run these tensors, and logs at DEBUG
            why those before it cannot. A name takes that backend or raises. Only ``'reference'``
            has second derivatives. Defaults to ``'auto'``.

    Returns:
        tuple[Tensor, Tensor]: What the latents gather, (B, N, Cv), and what the tokens gather,
        (B, L, Cv).

    Raises:
        ValueError: If shapes or devices do not fit together, if ``scale`` is a tensor that wants a
            gradient, or if the backend is unknown.
        RuntimeError: If the named backend cannot run these tensors.
    """
    tensors = latent_r, latent_v, token_r, token_v
    _check(*tensors, num_heads)
    scale = as_number(scale, latent_r.shape[2], num_heads)
    backend = choose(BIDIRECTIONAL_BACKENDS, backend, *tensors, num_heads)
    return backend.attend(*tensors, num_heads, scale)


def check_bidirectional_backend(name: str) -> None:
    """Raise ValueError unless a backend has this name, or it is ``'auto'``."""
    check_name(BIDIRECTIONAL_BACKENDS, name)


def _check(
    latent_r: Tensor, latent_v: Tensor, token_r: Tensor, token_v: Tensor, num_heads: int
) -> None:
    tensors = latent_r, latent_v, token_r, token_v
    shapes = [tuple(x.shape) for x in tensors]  # written out only if they are wrong
    if any(x.ndim != 3 for x in tensors):
        raise ValueError(f'references and values must be (B, N or L, C); got {shapes}')
    fits = (
        latent_r.shape[:2] == latent_v.shape[:2]
        and token_r.shape[:2] == token_v.shape[:2]
        and latent_r.shape[::2] == token_r.shape[::2]
        and latent_v.shape[2] == token_v.shape[2]
    )
    if not fits or 0 in (*latent_r.shape[1:], *token_r.shape[1:]):
        raise ValueError(
            'references and values must be (B, N, C), (B, N, Cv), (B, L, C), (B, L, Cv), with at '
            f'least one latent, token and channel; got {shapes}'
        )
    if num_heads < 1 or latent_r.shape[2] % num_heads or latent_v.shape[2] % num_heads:
        raise ValueError(
            f'{latent_r.shape[2]} and {latent_v.shape[2]} channels must be multiples of '
            f'num_heads={num_heads}'
        )
    if any(x.device != latent_r.device for x in tensors):
        devices = ', '.join(str(x.device) for x in tensors)
        raise ValueError(f'all tensors must be on one device; got {devices}')
