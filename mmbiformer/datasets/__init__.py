"""Data sets that ship with the package."""

from .shapes import CLASSES, Instance, Scene, ShapesSpec, make_shapes, render_scene, write_coco

__all__ = [
    'CLASSES',
    'Instance',
    'Scene',
    'ShapesSpec',
    'make_shapes',
    'render_scene',
    'write_coco',
]
