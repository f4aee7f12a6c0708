"""Routed attention in fused C++, for CPUs; importing this compiles nothing.

Keys and values are read from where they lie: nothing is gathered or rearranged in memory, forward
or backward (but a map whose channels are not adjacent is copied first). The library is compiled
when it is first needed (:mod:`.library`), for the processor it runs on.
"""

import functools

import torch
from torch import Tensor
from torch.nn import Parameter

from ...regions import eager, exporting
from ...schema import attend as attend_fused
from .library import why_no_library

LANES = 8  # floats that attention.cpp reads at a time

attend = functools.partial(attend_fused, backend='cpp')


def why_not(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> str | None:
    """Why these tensors cannot be run, or None."""
    maps = query, key, value
    if query.device.type != 'cpu':
        return f'tensors are on {query.device.type}, and it is made for CPUs'
    if not query.dtype == key.dtype == value.dtype == torch.float32:
        return (
            f'query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; '
            'it takes torch.float32'
        )
    for x in maps:
        if x.shape[3] // num_heads % LANES:
            return f'heads of {x.shape[3] // num_heads} channels; they must be multiples of {LANES}'
    if exporting():
        return 'what is exported runs without this project'
    compiling = torch.compiler.is_compiling()
    if not (compiling or eager()) or any(type(x) not in (Tensor, Parameter) for x in maps):
        return 'a tracer, transform or subclass of tensors wants to see what is computed'
    return why_no_library()
