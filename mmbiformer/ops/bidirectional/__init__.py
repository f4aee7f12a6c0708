"""Bi-directional cross-attention (BiXT): the public function and its implementations.

A backend is a module with ``why_not``, the reason why it cannot run these tensors or None, and
``attend``. Backends never import one another.
"""

from .attention import (
    BIDIRECTIONAL_BACKENDS,
    bidirectional_attention,
    check_bidirectional_backend,
)

__all__ = ['BIDIRECTIONAL_BACKENDS', 'bidirectional_attention', 'check_bidirectional_backend']
