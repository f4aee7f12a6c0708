"""Layer normalization on channels-last maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` that under autocast on a GPU leaves maps in half precision.

    Autocast would copy them to float32, and what comes out back again for the linear layer that
    follows. Means and variances are computed in float32 either way. (On CPU PyTorch would sum
    gradients in half precision, so there nothing changes.)
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if not (x.is_cuda and torch.is_autocast_enabled('cuda')):
            return super().forward(x)
        dtype = torch.get_autocast_dtype('cuda')
        x, weight, bias = (each.to(dtype) for each in (x, self.weight, self.bias))
        with torch.autocast('cuda', enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
