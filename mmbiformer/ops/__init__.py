"""Bi-level routing attention on plain tensors; needs torch only.

:func:`route_regions` chooses the routes, :func:`routed_attention` attends along them. ``BACKENDS``
lists the implementations of the latter in the order in which ``backend='auto'`` tries them.
:func:`auto_grid` chooses how many regions a map is cut into.
:func:`agent_attention` is what DeBiFormer adds: attention to agents anywhere in the map.
:func:`bidirectional_attention` is BiXT's: latents and tokens attend to each other.
"""

from .agents import agent_attention
from .attention import check_backend, routed_attention
from .backends import BACKENDS
from .bidirectional import (
    BIDIRECTIONAL_BACKENDS,
    bidirectional_attention,
    check_bidirectional_backend,
)
from .regions import auto_grid, num_regions
from .routing import region_means, route_regions

__all__ = [
    'BACKENDS',
    'BIDIRECTIONAL_BACKENDS',
    'agent_attention',
    'auto_grid',
    'bidirectional_attention',
    'check_backend',
    'check_bidirectional_backend',
    'num_regions',
    'region_means',
    'route_regions',
    'routed_attention',
]
