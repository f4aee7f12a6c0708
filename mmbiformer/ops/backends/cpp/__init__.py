"""Routed attention in fused C++, for CPUs; importing this compiles nothing.

Keys and values are read in place: nothing is gathered or rearranged in memory, forward or backward.
Only a map whose channels are not adjacent is copied first. :mod:`.library` compiles the code when
it is first needed, for the processor it runs on.
"""

import functools

import torch
from torch import Tensor
from torch.nn import Parameter

from ...schema import attend as attend_fused
from ...tracing import eager, exporting
from .library import why_no_library

DTYPES = torch.float32, torch.bfloat16
LANES = 8  # floats that attention.cpp reads at a time

attend = functools.partial(attend_fused, backend='cpp')


def why_not(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> str | None:
    """Why these tensors cannot be run, or None."""
    maps = query, key, value
    if query.device.type != 'cpu':
        return f'tensors are on {query.device.type}, and it is made for CPUs'
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        return (
            f'query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; '
            'it takes torch.float32 or torch.bfloat16'
        )
    for x in maps:
        if x.shape[3] // num_heads % LANES:
            return f'heads of {x.shape[3] // num_heads} channels; it takes multiples of {LANES}'
    if exporting():
        return 'an exported graph must run without this project'
    compiling = torch.compiler.is_compiling()
    if not (compiling or eager()) or any(type(x) not in (Tensor, Parameter) for x in maps):
        return 'a tracer, transform or subclass of tensors must see each operation'
    return why_no_library()
