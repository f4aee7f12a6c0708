"""Multiply-adds of a model, attention included."""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Count the multiply-adds of one forward pass, part by part.

    It counts products: convolutions, linear layers, and the attention of each token to the tokens
    it is routed to. It leaves out norms, activations, softmax and interpolation, which add about
    half a percent to a BiFormer.

    Args:
        model: The model; set to eval mode.
        *args: What its forward takes.
        **kwargs: What its forward takes.

    Returns:
        dict[str, int]: Multiply-adds of the model ('total'), of each direct child that has any, and
        of the rest ('other').
    """
    model.eval()
    # The counter cannot see into fused kernels. The reference and PyTorch's plain attention are
    # made of products.
    routed = [m for m in model.modules() if isinstance(getattr(m, 'backend', None), str)]
    backends = [module.backend for module in routed]
    for module in routed:
        module.backend = 'reference'
    try:
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for module, backend in zip(routed, backends, strict=True):
            module.backend = backend
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    total = flops.pop('Global')
    macs = {'total': total // 2}
    for name, _ in model.named_children():
        part = sum(_outermost(flops, f'{type(model).__name__}.{name}').values())
        if part:
            macs[name] = part // 2
    rest = 2 * macs['total'] - 2 * sum(macs[name] for name in macs if name != 'total')
    return macs | ({'other': rest // 2} if rest else {})


def _outermost(flops: dict[str, int], part: str) -> dict[str, int]:
    """Return the entries at or below a part that are inside no other entry.

    A part may be called past its hooks; then only its children have entries.
    """
    inside = {name: n for name, n in flops.items() if f'{name}.'.startswith(f'{part}.')}
    return {
        name: n
        for name, n in inside.items()
        if not any(name.startswith(f'{other}.') for other in inside)
    }
