"""Sums and activations that take no new memory in inference.

On CPU the pages of a new large tensor cost more than the arithmetic that fills it. Training keeps
to new memory: autograd and hooks may still need the old values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch; without gradients in the memory of ``branch``, which must then not be used again.

    Args:
        x: Any tensor.
        branch: Of the same shape.

    Returns:
        Tensor: The sum.
    """
    if torch.is_grad_enabled() or branch.dtype != x.dtype:
        return x + branch
    return branch.add_(x)


def gelu(x: Tensor) -> Tensor:
    """GELU; without gradients in the memory of ``x``, which must then not be used again.

    Args:
        x: Any floating-point tensor.

    Returns:
        Tensor: Of the shape and type of ``x``.
    """
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
