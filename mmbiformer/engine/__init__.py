"""What training needs and no host library ships, and what the commands in tools/ share."""

from .check_annotations_hook import AnnotationError, CheckAnnotationsHook
from .check_classes_hook import CheckClassesHook, ClassCountError
from .check_finite_hook import CheckFiniteHook, NotFiniteError
from .check_pairs import MissingFileError
from .checkpoint_hook import CheckpointHook
from .ema import SideEMAHook
from .lagging_cosine import LaggingCosineLR
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = [
    'AnnotationError',
    'CheckAnnotationsHook',
    'CheckClassesHook',
    'CheckFiniteHook',
    'CheckpointHook',
    'ClassCountError',
    'LaggingCosineLR',
    'LayerDecayOptimWrapperConstructor',
    'MissingFileError',
    'NotFiniteError',
    'SideEMAHook',
]
