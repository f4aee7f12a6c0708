"""Convolution on channels-last maps."""

from torch import Tensor, nn


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of a channels-last map.

    Args:
        dim: Channels, C.
        kernel_size: Side of the (odd) square kernel, in tokens.
        stride: Tokens from one output to the next. Defaults to 1, same size in and out.
        bias: Whether to add a bias. Defaults to True.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H / stride, W / stride, C), rounded up."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
