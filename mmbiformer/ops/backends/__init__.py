"""Implementations of routed attention, the preferred one first.

A backend is a module with two functions. ``why_not(query, key, value, num_heads)`` gives the reason
why it cannot run these tensors, or None. ``attend(query, key, value, routes, settings)`` attends.
Backends never import one another.
"""

from . import cpp, reference, sdpa, triton

BACKENDS = {'triton': triton, 'cpp': cpp, 'sdpa': sdpa, 'reference': reference}
