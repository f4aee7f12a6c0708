"""Two-layer perceptron on channels-last maps."""

import torch.nn.functional as F
from torch import Tensor, nn

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
        return self.fc2(F.gelu(self.fc1(x)))
