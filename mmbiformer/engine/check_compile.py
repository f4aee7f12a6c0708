"""Ask torch.compile, and for a compiler, before anything is written; MMEngine asks later."""

import os
from typing import Any

import torch


def compile_problem(settings: bool | dict[str, Any] | None) -> str | None:
    """Say why a training cannot be compiled; None if nothing is known of that.

    Args:
        settings: MMEngine's ``compile``: True, or arguments of :func:`torch.compile`. False and
            None leave a model as it is.
    """
    if settings is None or settings is False:
        return None
    options = {} if settings is True else settings
    try:
        torch.compile(lambda: None, **options)
    except Exception as error:  # of any class, by the backend
        return f'torch.compile: {error!s:.200}'
    for_cpu = not torch.cuda.is_available() and options.get('backend', 'inductor') == 'inductor'
    return compiler_problem() if for_cpu and not options.get('disable') else None


def compiler_problem() -> str | None:
    """Say that PyTorch finds no C++ compiler; None if it does, or is too old to tell."""
    try:
        from torch._inductor import cpp_builder, exc
    except ImportError:
        return None
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return (
            f'there is no working C++ compiler {os.environ.get("CXX", "g++")}; install one, or '
            'name another in the environment as CXX=PATH'
        )
    return None
