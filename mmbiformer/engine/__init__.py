"""Extensions of MMEngine that training needs and no host library ships."""

from .hooks import (
    CheckClassesHook,
    CheckFiniteHook,
    CheckpointHook,
    SanityRunHook,
    SideEMAHook,
)
from .optimizers import LayerDecayOptimWrapperConstructor
from .schedulers import LaggingCosineLR

__all__ = [
    'CheckClassesHook',
    'CheckFiniteHook',
    'CheckpointHook',
    'LaggingCosineLR',
    'LayerDecayOptimWrapperConstructor',
    'SanityRunHook',
    'SideEMAHook',
]
