"""Data sets that ship with the package: synthetic shapes, in three formats."""

from .shapes import CLASSES, Instance, Scene, ShapesSpec, render_scene
from .shapes_folder import make_shapes
from .shapes_formats import FORMATS, SEGMENTATION_CLASSES, write_ade20k, write_coco, write_imagenet

__all__ = [
    'CLASSES',
    'FORMATS',
    'SEGMENTATION_CLASSES',
    'Instance',
    'Scene',
    'ShapesSpec',
    'make_shapes',
    'render_scene',
    'write_ade20k',
    'write_coco',
    'write_imagenet',
]
