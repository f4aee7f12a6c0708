"""Bi-level routing attention on plain tensors; needs torch only.

:func:`route_regions` chooses the routes, :func:`routed_attention` attends along them. ``BACKENDS``
lists the implementations of the latter in the order in which ``backend='auto'`` tries them.
:func:`auto_grid` chooses how many regions a map is cut into.
:func:`agent_attention` is what DeBiFormer adds: attention to agents anywhere in the map.
"""

from .agents import agent_attention
from .attention import check_backend, routed_attention
from .backends import BACKENDS
from .regions import auto_grid, num_regions
from .routing import region_means, route_regions

__all__ = [
    'BACKENDS',
    'agent_attention',
    'auto_grid',
    'check_backend',
    'num_regions',
    'region_means',
    'route_regions',
    'routed_attention',
]
