"""Sums and activations that reuse memory in inference.

On CPU the pages of a new large tensor cost more than the arithmetic that fills it. Backbones allow
reuse with :func:`reused_memory` while nothing else can see the tensors. Training and hooks may
still need the old values.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_allowed = threading.local()


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Let :func:`add` and :func:`gelu` reuse memory, in this thread and only without gradients."""
    before = getattr(_allowed, 'here', False)
    _allowed.here = True
    try:
        yield
    finally:
        _allowed.here = before


def add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch; under :func:`reused_memory` it overwrites ``branch``.

    Args:
        x: Any tensor.
        branch: A tensor of the same shape, which the caller must not use again.

    Returns:
        Tensor: The sum.
    """
    return branch.add_(x) if _reuses() and branch.dtype == x.dtype else x + branch


def gelu(x: Tensor) -> Tensor:
    """GELU; under :func:`reused_memory` it overwrites ``x``.

    Args:
        x: Any floating-point tensor, which the caller must not use again.

    Returns:
        Tensor: The same shape and dtype.
    """
    return torch.ops.aten.gelu_(x) if _reuses() else F.gelu(x)


def _reuses() -> bool:
    # A compiler plans memory itself, and cannot look into threads.
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return getattr(_allowed, 'here', False)
