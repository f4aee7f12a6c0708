"""Two-layer perceptrons on channels-last maps."""

from torch import Tensor, nn

from .conv import DepthwiseConv2d
from .inplace import add, gelu
from .linear import Linear


class MLP(nn.Module):
    """Linear, GELU, Linear, token by token.

    Args:
        dim: Channels in and out, C.
        hidden_dim: Channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        return self.fc2(gelu(self.fc1(x)))


class ConvMLP(MLP):
    """An MLP that mixes each hidden channel with its neighbourhood: a residual 3x3 convolution.

    Args:
        dim: Channels in and out, C.
        hidden_dim: Channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim)
        self.conv = DepthwiseConv2d(hidden_dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x = self.fc1(x)
        return self.fc2(gelu(add(x, self.conv(x))))
