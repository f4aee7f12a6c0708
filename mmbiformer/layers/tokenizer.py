"""From an image to tokens that know their place (BiXT)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 16  # pixels a side
AXIS_CHANNELS = 32  # sines and cosines an axis


class Tokenizer(nn.Module):
    """Cuts images into tokens and adds an embedding of their places.

    Images may have any size. With ``'patch'`` sides that are not multiples of the stride are padded
    with zeros at the right and bottom; convolutions round their maps up as well.

    Args:
        in_channels: Channels of the images.
        dim: Channels of the tokens, C.
        stride: Pixels from token to token: 4, 8 or 16.
        kind: ``'patch'``: one convolution of 16x16 pixels; ``'conv'``: 3x3 convolutions of stride
            2, each twice as wide as the one before, with BatchNorm.

    Raises:
        ValueError: If the stride or the kind is unknown.
    """

    def __init__(self, in_channels: int, dim: int, stride: int, kind: str) -> None:
        super().__init__()
        if stride not in (4, 8, 16) or kind not in ('patch', 'conv'):
            raise ValueError(
                f"stride={stride} must be 4, 8 or 16, tokenizer={kind!r} 'patch' or 'conv'"
            )
        self.stride, self.kind = stride, kind
        if kind == 'patch':
            self.proj = nn.Conv2d(in_channels, dim, PATCH, stride, (PATCH - stride) // 2)
        else:
            self.proj = _convolutions(in_channels, dim, stride)
        self.pos_proj = nn.Linear(2 * AXIS_CHANNELS, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to tokens (B, H / stride, W / stride, C), rounded up."""
        if self.kind == 'patch':
            height, width = images.shape[2:]
            images = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        tokens = self.proj(images).permute(0, 2, 3, 1).contiguous()
        # The projection of two codes side by side is the sum of their own projections.
        down, across = self.pos_proj.weight.split(AXIS_CHANNELS, 1)
        rows, columns = (axis_code(n, tokens.device) for n in tokens.shape[1:3])
        rows = F.linear(rows.to(down.dtype), down, self.pos_proj.bias)
        columns = F.linear(columns.to(across.dtype), across)
        return tokens + (rows[:, None] + columns)

    def extra_repr(self) -> str:
        return f'kind={self.kind!r}, stride={self.stride}'


def axis_code(count: int, device: torch.device | None = None) -> Tensor:
    """The fixed code of each place on an axis: a sine and a cosine of 16 wavelengths.

    Args:
        count: Places on the axis, n.
        device: Where the table goes. Defaults to None: as PyTorch says.

    Returns:
        Tensor: (n, 32), in float32, in which the authors compute it.
    """
    at = torch.arange(1, count + 1, dtype=torch.float32, device=device)
    at = at / (at[-1:] + 1e-6) * (2 * math.pi)
    channel = torch.arange(0, AXIS_CHANNELS, 2, dtype=torch.float32, device=device)
    at = at[:, None] / 10000 ** (channel / AXIS_CHANNELS)
    return torch.stack((at.sin(), at.cos()), 2).flatten(1)


def _convolutions(in_channels: int, dim: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for halvings in reversed(range(stride.bit_length() - 1)):
        width = dim // 2**halvings
        conv = nn.Conv2d(in_channels, width, 3, 2, 1, bias=False)
        layers += [nn.Sequential(conv, nn.BatchNorm2d(width)), nn.GELU()]
        in_channels = width
    return nn.Sequential(*layers[:-1])
