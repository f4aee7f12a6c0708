"""Implementations of routed attention, by falling preference.

A backend is a module with ``why_not(query, key, value, num_heads)``, which gives the reason why it
cannot run these tensors or None, and ``attend(...)``. Backends never import one another.
"""

from . import cpp, reference, sdpa, triton

BACKENDS = {'triton': triton, 'cpp': cpp, 'sdpa': sdpa, 'reference': reference}
