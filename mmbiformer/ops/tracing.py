"""Questions about exporters, compilers and transforms that may watch a call."""

import torch


def exporting() -> bool:
    """Whether ``torch.export`` is making a graph, which must hold for maps of any size.

    A branch on a size would fix that size, so short cuts for some sizes must be left out.
    ``torch.compile`` does not need that: it makes another graph for other sizes.
    """
    return _is_exporting()


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    # Called as it is: where Dynamo traces the question (PyTorch 2.11), the answer is always yes
    # (https://github.com/pytorch/pytorch/issues/176347).
    return torch.compiler.is_exporting()


def with_symbols() -> bool:
    """Whether sizes are symbols that ``torch.sym_min`` and ``torch.sym_max`` accept.

    They are in ``torch.export``, except while it traces with Dynamo (``strict=True``).
    """
    return exporting() and not torch.compiler.is_dynamo_compiling()


def always(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; in an exported graph, for all sizes it is made for."""
    if not exporting():
        return bool(condition)
    if not with_symbols():
        return False  # asking would fix the size
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def eager() -> bool:
    """Whether operations simply run: no compiler, tracer or ``torch.func`` transform watches."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )
