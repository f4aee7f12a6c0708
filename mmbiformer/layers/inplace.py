"""Sums and activations that reuse memory in inference.

On CPU the pages of a new large tensor cost more than the arithmetic that fills it. Backbones allow
reuse with :func:`reused_memory` while nothing else can see the tensors. Training and hooks may
still need the old values.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..ops.regions import ceil_div
from ..ops.tracing import eager

# How large a map may be in inference on CPU: what a block makes of it is then small enough to stay
# in the processor's cache and for glibc to keep its memory for the next block.
MAP_BYTES = 3 * 2**20
_allowed = threading.local()


def in_parts(
    module: nn.Module, run: Callable[..., Any], x: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """Run a module, in inference on CPU a few images at a time in memory that is reused.

    Args:
        module: What ``run`` runs; nothing in it may mix the images of a batch.
        run: Takes the tensors and returns a tuple of tensors, images first.
        x: The largest tensor, (B, ...).
        *others: More tensors, (B, ...).

    Returns:
        tuple[Tensor, ...]: What ``run`` returns for the whole batch.
    """
    if not spares_memory(module, x):
        return run(x, *others)
    images = max(1, MAP_BYTES // max(1, x.shape[1:].numel() * x.element_size()))
    # Parts of one size: a small last part would leave threads idle.
    count = max(1, ceil_div(len(x), images))
    with reused_memory():
        parts = [
            run(*part) for part in zip(*(t.tensor_split(count) for t in (x, *others)), strict=True)
        ]
    return parts[0] if count == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def spares_memory(module: nn.Module, x: Tensor) -> bool:
    """Whether a module can take a batch in parts and reuse memory: in inference on CPU.

    A hook, a wrapper or a patched ``forward`` gets whole batches, and may keep them.
    """
    if x.device.type != 'cpu' or torch.is_grad_enabled() or not eager():
        return False
    hooks = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    return not hooks and not any(map(_may_be_watched, module.modules()))


def _may_be_watched(module: nn.Module) -> bool:
    """Whether code of others may see what goes into a module and comes out."""
    package = type(module).__module__.partition('.')[0]
    return bool(
        package not in ('mmbiformer', 'timm', 'torch')
        or 'forward' in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
    )


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
