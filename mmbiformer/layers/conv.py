"""Convolution on channels-last maps."""

from torch import Tensor, nn


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of a channels-last map, same size in and out.

    Args:
        dim: Channels, C.
        kernel_size: Side of the (odd) square kernel, in tokens.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
