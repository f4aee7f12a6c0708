"""The public routed attention: checks, choice of backend, dispatch."""

import math

import torch
from torch import Tensor

from .backends import BACKENDS
from .choice import as_number, check_name, choose
from .regions import num_regions
from .settings import Settings
from .tracing import eager


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    *,
    num_heads: int,
    region_size: tuple[int, int],
    key_region_size: tuple[int, int] | None = None,
    scale: float | None = None,
    backend: str = 'auto',
) -> Tensor:
    """Let the tokens of each query region attend to all tokens of its routed key regions.

    The fine level of bi-level routing attention (BiFormer, equations 5 to 7, without the LePE
    term). Maps go in and out in image order, channels last. They may be slices of a packed
    projection. Queries may come from another map than keys and values. If a map is not a multiple
    of its region size, regions at the right and bottom hold fewer tokens, and nothing beyond the
    edge is attended to.

    Example:
        >>> q, k, v = torch.randn(3, 2, 14, 14, 64)  # 2 images, 14x14 tokens, 64 channels
        >>> routes = route_regions(q, k, topk=4, region_size=(2, 2))
        >>> out = routed_attention(q, k, v, routes, num_heads=2, region_size=(2, 2))

    Args:
        query: (B, Hq, Wq, C).
        key: (B, Hk, Wk, C).
        value: (B, Hk, Wk, Cv).
        routes: int64, (B, Rq, k): the key regions of each query region, numbered row by row, as
            :func:`mmbiformer.ops.route_regions` gives them. A region listed twice counts
            twice. A number that no key region has is an error, which GPUs do not notice.
        num_heads: Number of heads; C and Cv must be multiples of it.
        region_size: Height and width of a query region, in tokens.
        key_region_size: Height and width of a key region, in tokens. Defaults to None, the
            same as ``region_size``.
        scale: Factor on the logits, a number. Defaults to None, (C / num_heads) ** -0.5. BiFormer
            itself uses C ** -0.5.
        backend: ``'auto'`` takes the first backend that can run these tensors, and logs at DEBUG
            why those before it cannot. A name takes that backend or raises. Only ``'reference'``
            has second derivatives. Defaults to ``'auto'``.

    Returns:
        Tensor: (B, Hq, Wq, Cv).

    Raises:
        ValueError: If shapes or devices do not fit together, if ``scale`` is a tensor that wants a
            gradient, or if the backend is unknown.
        IndexError: On CPU, if ``routes`` has a number that no key region has; compiled graphs
            may not notice.
        RuntimeError: If the named backend cannot run these tensors.
    """
    key_region_size = key_region_size or region_size
    _check(query, key, value, routes, num_heads, region_size, key_region_size)
    scale = as_number(scale, query.shape[-1], num_heads)
    run = choose(BACKENDS, backend, query, key, value, num_heads).attend
    settings = Settings(num_heads, tuple(region_size), tuple(key_region_size), scale)
    return run(query, key, value, routes, settings)


def check_backend(name: str) -> None:
    """Raise ValueError unless a backend has this name, or it is ``'auto'``."""
    check_name(BACKENDS, name)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_heads: int,
    region_size: tuple[int, int],
    key_region_size: tuple[int, int],
) -> None:
    if num_heads < 1 or min(region_size) < 1 or min(key_region_size) < 1:
        raise ValueError(
            f'num_heads={num_heads}, region_size={region_size} and '
            f'key_region_size={key_region_size} must be positive'
        )
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            'query, key and value must be maps (B, H, W, C); got '
            f'{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}'
        )
    devices = [x.device for x in (query, key, value, routes)]
    if any(device != devices[0] for device in devices):
        raise ValueError(
            'query, key, value and routes must be on one device; got '
            + ', '.join(map(str, devices))
        )
    batch, *size, channels = query.shape
    if key.shape[::3] != (batch, channels) or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            'query and key must share batch and channels, key and value batch and size; got '
            f'{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}'
        )
    if channels % num_heads or value.shape[-1] % num_heads:
        raise ValueError(
            f'{channels} query and {value.shape[-1]} value channels must be multiples of '
            f'num_heads={num_heads}'
        )
    rows, cols = num_regions(size, region_size)
    if (
        routes.ndim != 3
        or routes.shape[:2] != (batch, rows * cols)
        or routes.shape[2] < 1
        or routes.dtype != torch.int64
    ):
        raise ValueError(
            f'routes must be int64 (B, Rq, k) = ({batch}, {rows * cols}, k >= 1) for a '
            f'{size[0]}x{size[1]} query map in {region_size[0]}x{region_size[1]} regions; '
            f'got {routes.dtype} {tuple(routes.shape)}'
        )
    if type(routes) is Tensor and routes.device.type == 'cpu' and eager() and routes.numel():
        count = math.prod(num_regions(key.shape[1:3], key_region_size))
        least, most = (int(number) for number in routes.aminmax())
        if least < 0 or most >= count:
            raise IndexError(
                f'routes has numbers that no key region has: regions are numbered from 0 to '
                f'{count - 1}, and routes goes from {least} to {most}'
            )
