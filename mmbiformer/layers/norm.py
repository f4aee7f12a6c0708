"""Layer normalization on channels-last maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` that keeps maps in half precision under autocast on a GPU.

    Autocast would copy its input to float32, and its output back for the linear layer that follows.
    Means and variances are computed in float32 either way. On CPU nothing changes, because PyTorch
    would sum gradients in half precision there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if not (x.is_cuda and torch.is_autocast_enabled('cuda')):
            return super().forward(x)
        dtype = torch.get_autocast_dtype('cuda')
        x, weight, bias = (each.to(dtype) for each in (x, self.weight, self.bias))
        with torch.autocast('cuda', enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
