"""Sums and activations that take no new memory in inference.

On CPU the pages of a new large tensor cost more than the arithmetic that fills it. Backbones allow
it with :func:`reused_memory` where nothing else can see the tensors: training and hooks may still
need the old values.
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
    """Let :func:`add` and :func:`gelu` reuse memory, in this thread and without gradients."""
    before = getattr(_allowed, 'here', False)
    _allowed.here = True
    try:
        yield
    finally:
        _allowed.here = before


def add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch; under :func:`reused_memory` in that of ``branch``, which must not be used again.

    Args:
        x: Any tensor.
        branch: Of the same shape.

    Returns:
        Tensor: The sum.
    """
    return branch.add_(x) if _reuses() and branch.dtype == x.dtype else x + branch


def gelu(x: Tensor) -> Tensor:
    """GELU; under :func:`reused_memory` in that of ``x``, which must not be used again.

    Args:
        x: Any floating-point tensor.

    Returns:
        Tensor: Of the shape and type of ``x``.
    """
    return torch.ops.aten.gelu_(x) if _reuses() else F.gelu(x)


def _reuses() -> bool:
    # A compiler plans memory itself, and cannot look into threads.
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return getattr(_allowed, 'here', False)
