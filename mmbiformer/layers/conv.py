"""Convolution on channels-last maps."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.tracing import eager

# On CPU the gradient of a depthwise kernel is fast for up to three columns and any number of rows.
# A fourth column makes it ten times as slow.
FAST_COLUMNS = 3


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of a channels-last map.

    Args:
        dim: Channels, C.
        kernel_size: Side of the square kernel, an odd number of tokens.
        stride: Tokens from one output to the next. Defaults to 1, the same size in and out.
        bias: Whether to add a bias. Defaults to True.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H / stride, W / stride, C), rounded up."""
        x = x.permute(0, 3, 1, 2)
        if self._trains_in_pieces(x):
            out = _GradientInPieces.apply(x, self.weight, self.bias)
        else:
            out = super().forward(x)
        return out.permute(0, 2, 3, 1)

    def _trains_in_pieces(self, x: Tensor) -> bool:
        return (
            eager()
            and x.device.type == 'cpu'
            and x.dtype == torch.float32
            and self.kernel_size[1] > FAST_COLUMNS
            and self.stride == (1, 1)
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and x.numel() > 0
            and not torch.is_autocast_enabled('cpu')
        )


class _GradientInPieces(torch.autograd.Function):
    """A depthwise convolution that computes its kernel's gradient a few columns at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[3] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        pad = weight.shape[3] // 2
        if torch.is_grad_enabled():  # a gradient of this gradient is asked for
            return _gradient(grad, x, weight, (pad, pad), ctx.needs_input_grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            with torch.autocast('cpu', enabled=False):
                # The same bits as PyTorch's, in half the time.
                grad_x = F.conv2d(grad, weight.flip(2, 3), padding=pad, groups=len(weight))
        return grad_x, *_kernel_gradient(grad, x, weight, ctx.needs_input_grad[2])


def _kernel_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a kernel (C, 1, K, K) and its bias, in pieces of a few columns.

    The columns from ``start`` on see the padded map moved by ``start`` tokens. In memory that is
    the same tensor from an offset on. Tokens that wrap from one row to the next meet the zeros that
    widen ``grad``.
    """
    batch, channels, height, width = x.shape
    side = weight.shape[3]
    pad = side // 2
    tokens = batch * height * (width + 2 * pad)
    padded = x.new_empty(tokens + side, channels)
    padded[tokens:] = 0
    rows = padded[:tokens].view(batch, height, -1, channels)
    rows[:, :, :pad] = 0
    rows[:, :, width + pad :] = 0
    rows[:, :, pad : width + pad] = x.permute(0, 2, 3, 1)
    wide = F.pad(grad.permute(0, 2, 3, 1), (0, 0, 0, 2 * pad + 1 - FAST_COLUMNS))
    wide = wide.permute(0, 3, 1, 2)
    pieces, grad_bias = [], None
    for start in range(0, side, FAST_COLUMNS):
        moved = padded[start : start + tokens].view_as(rows).permute(0, 3, 1, 2)
        some = weight[..., :FAST_COLUMNS]
        _, piece, sums = _gradient(wide, moved, some, (pad, 0), (False, True, bias and not start))
        pieces.append(piece[..., : side - start])
        grad_bias = sums if not start else grad_bias
    return torch.cat(pieces, 3), grad_bias


def _gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    padding: tuple[int, int],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """PyTorch's gradients of a depthwise convolution, for map, kernel and bias."""
    channels = len(weight)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [channels], [1, 1], padding, [1, 1], False, [0, 0], channels, needed
    )
