"""The data set that ships with the package: synthetic shapes, in three formats."""

from .ade20k import SEGMENTATION_CLASSES
from .folder import format_summary, make_shapes, summarise
from .formats import FORMATS
from .scenes import Instance, Scene, Scenes, SingleScenes, render_scene
from .spec import CLASSES, ShapesSpec

__all__ = [
    'CLASSES',
    'FORMATS',
    'SEGMENTATION_CLASSES',
    'Instance',
    'Scene',
    'Scenes',
    'ShapesSpec',
    'SingleScenes',
    'format_summary',
    'make_shapes',
    'render_scene',
    'summarise',
]
