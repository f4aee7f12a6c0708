"""Routed attention in fused Triton kernels, for GPUs; importing this does not import Triton.

Keys and values are loaded in place: nothing is gathered or rearranged in memory, forward or
backward. Gradients of keys and values are summed by key region over the inverse routes, in order,
so they are equal from run to run.
"""

import functools
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from ...schema import attend as attend_fused

INSTALLED = find_spec('triton') is not None
# Triton's interpreter runs kernels on CPU, for tests. It does not know bfloat16.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DTYPES = (torch.float16, torch.float32, *(() if INTERPRETED else (torch.bfloat16,)))
LARGEST_HEAD = 128
LARGEST_MAP = 2**19  # tokens; the kernels divide in float32
LARGEST_BATCH = 2**16 - 1  # CUDA's limit for the second side of a grid
LARGEST_IMAGE = 2**31 - 1  # elements from the first to the last of an image: offsets are 32 bits

attend = functools.partial(attend_fused, backend='triton')


def why_not(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> str | None:
    """Why these tensors cannot be run, or None."""
    if not INSTALLED:
        return 'Triton is not installed (pip install triton)'
    if not INTERPRETED:
        if not query.is_cuda:
            return f'tensors are on {query.device.type}, and Triton needs a CUDA GPU'
        if too_old(query.device.index):
            return 'the GPU is older than compute capability 8.0 (Ampere)'
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        known = ', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)
        return (
            f'query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; '
            f'the kernels take one of {known} for all three'
        )
    widest = max(query.shape[3], value.shape[3]) // num_heads
    if widest > LARGEST_HEAD:
        return f'heads of {widest} channels are wider than {LARGEST_HEAD}'
    if max(x.shape[1] * x.shape[2] for x in (query, key)) > LARGEST_MAP:
        return f'a map has more than {LARGEST_MAP} tokens'
    if torch.compiler.is_compiling():
        return None  # in a graph for all sizes, further questions would fix the size
    if query.shape[0] > LARGEST_BATCH:
        return f'a batch has more than {LARGEST_BATCH} images'
    return too_far(query, key, value)


def too_far(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why offsets of 32 bits cannot address an image, or None."""
    output = query.shape[1] * query.shape[2] * value.shape[3]
    if max(output, span(query), span(key), span(value)) > LARGEST_IMAGE:
        return f'an image spans more than {LARGEST_IMAGE} elements'
    return None


def span(x: Tensor) -> int:
    """Elements from the first to the last of an image in memory, or of a contiguous copy of it."""
    _, height, width, channels = x.shape
    _, down, right, deep = x.stride()
    reach = 1 + (height - 1) * down + (width - 1) * right + (channels - 1) * deep
    return max(height * width * channels, reach)


@torch.compiler.assume_constant_result
def too_old(device: int) -> bool:
    """Whether a GPU lacks the bfloat16 matrix units that the kernels need."""
    return torch.cuda.get_device_capability(device) < (8, 0)
