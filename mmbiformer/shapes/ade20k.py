"""The data set as semantic maps, laid out like ADE20K."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from .images import write_image
from .scenes import Scene
from .spec import CLASSES

FOLDERS = ('images', 'annotations')

SEGMENTATION_CLASSES = ('background', *CLASSES)
"""Classes of the pixels; distractors are background."""

ADE20K_SPLITS = {'train': 'training', 'val': 'validation'}


def semantic_map(scene: Scene) -> np.ndarray:
    """Class of every pixel, counted from 1 as in ADE20K's files; 0 means unlabelled there.

    Args:
        scene: The scene.

    Returns:
        uint8, ``(H, W)``: 1 + index into :data:`SEGMENTATION_CLASSES`. No pixel is 0.
    """
    classes = np.ones(scene.image.shape[:2], np.uint8)
    for instance in scene.instances:
        classes[instance.mask] = instance.label + 2
    return classes


def write(split_scenes: Iterable[Scene], out: Path, split: str) -> None:
    """Write scenes as one split of a semantic segmentation data set, laid out as ADE20K.

    Images go to ``OUT/images/training/000000.jpg`` and on, maps of :func:`semantic_map` to
    ``OUT/annotations/training/000000.png``. The split ``val`` has ``validation`` instead of
    ``training``. Classes are numbered from 1 as in ADE20K, so a config that inherits from
    MMSegmentation's ADE20K config reads them with ::

        dict(
            type='BaseSegDataset',
            data_root=OUT,
            data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
            metainfo=dict(classes=SEGMENTATION_CLASSES),
            reduce_zero_label=True,
        )

    Args:
        split_scenes: Scenes of the split; an iterator will do.
        out: Folder of the data set.
        split: Name of the split.
    """
    images, maps = _folders(out, split)
    for folder in (images, maps):
        folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(split_scenes):
        write_image(images / f'{index:06d}.jpg', scene.image)
        write_image(maps / f'{index:06d}.png', semantic_map(scene))


def is_whole(out: Path, split: str, count: int) -> bool:
    """Whether all files of a split are there."""
    images, maps = _folders(out, split)
    return len(list(images.glob('*.jpg'))) == len(list(maps.glob('*.png'))) == count


def summarise(out: Path, split: str) -> dict[str, float]:
    """Numbers that describe a split, by name."""
    _, maps = _folders(out, split)
    pixels = np.zeros(len(SEGMENTATION_CLASSES), np.int64)
    images = 0
    for path in sorted(maps.glob('*.png')):
        classes = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        pixels += np.bincount(classes.ravel() - 1, minlength=len(pixels))
        images += 1
    shares = (100 * pixels / max(pixels.sum(), 1)).round(1).tolist()
    names = (f'{name} pixels (%)' for name in SEGMENTATION_CLASSES)
    return {'images': images, **dict(zip(names, shares, strict=True))}


def _folders(out: Path, split: str) -> tuple[Path, Path]:
    """Where the images and the maps of a split are."""
    return out / 'images' / ADE20K_SPLITS[split], out / 'annotations' / ADE20K_SPLITS[split]
