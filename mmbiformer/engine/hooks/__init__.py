"""Hooks of MMEngine."""

from .check_classes import CheckClassesHook, ClassCountError
from .check_finite import CheckFiniteHook, NotFiniteError
from .check_length import CheckLengthHook
from .checkpoint import CheckpointHook
from .ema import SideEMAHook
from .sanity import SanityRunHook

__all__ = [
    'CheckClassesHook',
    'CheckFiniteHook',
    'CheckLengthHook',
    'CheckpointHook',
    'ClassCountError',
    'NotFiniteError',
    'SanityRunHook',
    'SideEMAHook',
]
