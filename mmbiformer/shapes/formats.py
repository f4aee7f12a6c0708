"""The three formats of the data set on disk.

All draw their scenes from the same generator, so the images of ``coco`` and ``ade20k`` are the
same. The docstring of each writer shows how a config reads its files.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from . import ade20k, coco, imagenet
from .scenes import Scene, Scenes, SingleScenes
from .spec import ShapesSpec


@dataclass(frozen=True)
class Format:
    """One way to lay the data set out.

    Attributes:
        spec: What its images look like by default.
        scenes: The sequence of a split's scenes.
        write: Writes a split: ``(scenes, out, split)``.
        is_whole: Whether all files of a split are there: ``(out, split, count)``.
        summarise: Numbers that describe a split: ``(out, split)``.
        folders: Folders that it makes in that of the data set.
    """

    spec: ShapesSpec
    scenes: type[Scenes]
    write: Callable[[Iterable[Scene], Path, str], None]
    is_whole: Callable[[Path, str, int], bool]
    summarise: Callable[[Path, str], dict[str, float]]
    folders: tuple[str, ...]


def _format(layout: ModuleType, spec: ShapesSpec, scenes: type[Scenes] = Scenes) -> Format:
    return Format(spec, scenes, layout.write, layout.is_whole, layout.summarise, layout.FOLDERS)


CENTRED = ShapesSpec(size=(64, 64), objects=(1, 1), shape_size=(40.0, 60.0), spread=0.1)
"""One shape that fills most of the image, among as many distractors as in the other formats."""

FORMATS = {
    'coco': _format(coco, ShapesSpec()),
    'ade20k': _format(ade20k, ShapesSpec()),
    'imagenet': _format(imagenet, CENTRED, SingleScenes),
}
