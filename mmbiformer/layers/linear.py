"""Linear layer on channels-last maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.tracing import exporting

FEW_TOKENS = 1024


class Linear(nn.Linear):
    """``nn.Linear`` for maps of shape (B, H, W, C).

    On CPU in float32 it runs as a 1x1 convolution. The sums are the same, but the bias is added on
    the way, while ``nn.Linear`` first writes it over the whole output. For a few tokens a
    convolution would take up to four times as long, mostly to rearrange its weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in_features) to (B, H, W, out_features)."""
        if exporting() or x.device.type != 'cpu' or x.dtype != torch.float32 or x.ndim != 4:
            return super().forward(x)
        if not torch.compiler.is_compiling() and x.numel() < FEW_TOKENS * self.in_features:
            return super().forward(x)
        weight = self.weight[:, :, None, None]
        return F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias).permute(0, 2, 3, 1)
