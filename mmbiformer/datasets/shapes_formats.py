"""The shapes data set on disk: COCO instances, ADE20K semantic masks, ImageNet class folders.

Every format draws its scenes from the same generator, so the images of ``coco`` and ``ade20k`` are
the same. How a config reads each is said at its writer.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from .shapes import (
    CLASSES,
    GENERATOR,
    VERSION,
    Instance,
    Scene,
    Scenes,
    ShapesSpec,
    SingleScenes,
    tight_box,
)

JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95)


def encode_image(path: Path, image: np.ndarray) -> bytes:
    """The content of an image file: RGB ``(H, W, 3)`` or one channel ``(H, W)``, uint8."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(path.suffix, image, JPEG if path.suffix == '.jpg' else ())[1].tobytes()


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image, see :func:`encode_image`."""
    # Not by OpenCV, which calls an empty PNG file a success when the disk is full.
    path.write_bytes(encode_image(path, image))


# COCO ----------------------------------------------------------------------------------------

MIN_POLYGON_IOU = 0.9
"""A polygon that gives back the mask less well than this is replaced by run lengths."""

POLYGON_TOLERANCE = 0.5
"""How far in pixels a polygon may leave the mask's outline to have fewer points."""


def _outline_polygon(mask: np.ndarray) -> list[float] | None:
    """Outline of a mask as ``[x0, y0, x1, y1, ...]``, ``None`` if it is not a single loop."""
    x, y, width, height = tight_box(mask)
    crop = mask[y : y + height, x : x + width].astype(np.uint8)
    # Enlarged, because OpenCV's contours run through pixel centres, which would lose a margin of
    # half a pixel all around.
    zoom = 4
    large = cv2.resize(crop, (width * zoom, height * zoom), interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) != 1:
        return None
    contour = cv2.approxPolyDP(contours[0], POLYGON_TOLERANCE * zoom, True)
    if len(contour) < 3:
        return None
    points = (contour.reshape(-1, 2) + 0.5) / zoom + np.array([x, y])
    return [round(value, 2) for value in points.ravel().tolist()]


def coco_segmentation(mask: np.ndarray) -> list[list[float]] | dict:
    """COCO ``segmentation`` of a mask.

    Args:
        mask: Visible pixels, bool, ``(H, W)``.

    Returns:
        One polygon where that is faithful; for masks with holes, of several parts or too small
        for a polygon, compressed run lengths, which are exact.
    """
    # Imported here: drawing scenes must not need the COCO tools.
    from pycocotools import mask as coco_mask

    exact = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    polygon = _outline_polygon(mask)
    if polygon is not None:
        drawn = coco_mask.frPyObjects([polygon], *mask.shape)
        if coco_mask.iou(drawn, [exact], [0])[0, 0] >= MIN_POLYGON_IOU:
            return [polygon]
    return {'size': list(mask.shape), 'counts': exact['counts'].decode('ascii')}


def coco_annotation(instance: Instance, image_id: int, annotation_id: int) -> dict:
    """COCO annotation of an instance.

    Besides the standard keys it has the instance's ``size`` and ``occlusion``, which readers of
    COCO files ignore.
    """
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': instance.label + 1,
        'bbox': tight_box(instance.mask),
        'area': int(instance.mask.sum()),
        'iscrowd': 0,
        'segmentation': coco_segmentation(instance.mask),
        'size': round(instance.size, 2),
        'occlusion': round(instance.occlusion, 4),
    }


def write_coco(split_scenes: Iterable[Scene], out: Path, split: str) -> None:
    """Write scenes as one split of a COCO instances data set.

    Images go to ``OUT/SPLIT/000000.jpg`` and on, annotations to
    ``OUT/annotations/instances_SPLIT.json``. An MMDetection config reads them with ::

        dict(
            type='CocoDataset',
            data_root=OUT,
            ann_file='annotations/instances_train.json',
            data_prefix=dict(img='train/'),
            metainfo=dict(classes=CLASSES),
        )

    Args:
        split_scenes: Scenes of the split; taken one at a time, so an iterator will do.
        out: Folder of the data set.
        split: Name of the split.
    """
    images, annotations = [], []
    (out / split).mkdir(parents=True, exist_ok=True)
    (out / 'annotations').mkdir(exist_ok=True)
    for image_id, scene in enumerate(split_scenes):
        name = f'{image_id:06d}.jpg'
        write_image(out / split / name, scene.image)
        height, width = scene.image.shape[:2]
        images.append({'id': image_id, 'file_name': name, 'height': height, 'width': width})
        for instance in scene.instances:
            # Ids start at 1: COCOeval takes 0 for "no match".
            annotations.append(coco_annotation(instance, image_id, len(annotations) + 1))
    coco = {
        'info': {'description': f'{GENERATOR} {split}', 'version': str(VERSION)},
        'images': images,
        'annotations': annotations,
        'categories': [
            {'id': label + 1, 'name': name, 'supercategory': 'shape'}
            for label, name in enumerate(CLASSES)
        ],
    }
    path = out / 'annotations' / f'instances_{split}.json'
    path.write_text(json.dumps(coco), encoding='utf-8')


def has_coco(out: Path, split: str, count: int) -> bool:
    """Whether the files of a split are there."""
    images = len(list((out / split).glob('*.jpg')))
    return (out / 'annotations' / f'instances_{split}.json').is_file() and images == count


SIZE_BINS = (16, 32)
"""Edges in pixels between the small, medium and large shapes of the summary."""


def summarise_coco(out: Path, split: str) -> dict[str, float]:
    """Numbers that describe a split, by name."""
    path = out / 'annotations' / f'instances_{split}.json'
    coco = json.loads(path.read_text(encoding='utf-8'))
    annotations = coco['annotations']
    labels = Counter(annotation['category_id'] for annotation in annotations)
    sizes = np.array([annotation['size'] for annotation in annotations])
    occlusions = np.array([annotation['occlusion'] for annotation in annotations])
    bins = np.bincount(np.digitize(sizes, SIZE_BINS), minlength=3)
    images = max(len(coco['images']), 1)
    runs = sum(isinstance(annotation['segmentation'], dict) for annotation in annotations)

    def percent(part: float) -> float:
        return round(100 * float(part) / max(len(annotations), 1), 1)

    return {
        'images': len(coco['images']),
        'instances': len(annotations),
        'instances per image': round(len(annotations) / images, 1),
        **{category['name']: labels[category['id']] for category in coco['categories']},
        f'under {SIZE_BINS[0]} px (%)': percent(bins[0]),
        f'{SIZE_BINS[0]} to {SIZE_BINS[1]} px (%)': percent(bins[1]),
        f'over {SIZE_BINS[1]} px (%)': percent(bins[2]),
        'over 5 % hidden (%)': percent(np.count_nonzero(occlusions > 0.05)),
        'mean hidden part (%)': percent(occlusions.sum()),
        'run-length masks (%)': percent(runs),
    }


# ADE20K --------------------------------------------------------------------------------------

SEGMENTATION_CLASSES = ('background', *CLASSES)
"""What the pixels of a semantic map are; distractors are background."""

ADE20K_SPLITS = {'train': 'training', 'val': 'validation'}


def semantic_map(scene: Scene) -> np.ndarray:
    """Class of every pixel, counted from 1 as in ADE20K's files, where 0 is for no class at all.

    Args:
        scene: The scene.

    Returns:
        uint8, ``(H, W)``: 1 + index into :data:`SEGMENTATION_CLASSES`. No pixel is 0.
    """
    classes = np.ones(scene.image.shape[:2], np.uint8)
    for instance in scene.instances:
        classes[instance.mask] = instance.label + 2
    return classes


def write_ade20k(split_scenes: Iterable[Scene], out: Path, split: str) -> None:
    """Write scenes as one split of a semantic segmentation data set, laid out as ADE20K.

    Images go to ``OUT/images/training/000000.jpg`` and on, maps of :func:`semantic_map` to
    ``OUT/annotations/training/000000.png``; ``validation`` instead of ``training`` for the split
    ``val``. Classes are numbered from 1 as in ADE20K, so pipelines and data sets that inherit from
    MMSegmentation's ADE20K config, ``reduce_zero_label=True`` included, read them with ::

        dict(
            type='BaseSegDataset',
            data_root=OUT,
            data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
            metainfo=dict(classes=SEGMENTATION_CLASSES),
            reduce_zero_label=True,
        )

    Args:
        split_scenes: Scenes of the split; taken one at a time, so an iterator will do.
        out: Folder of the data set.
        split: Name of the split.
    """
    images, maps = _ade20k_folders(out, split)
    for folder in (images, maps):
        folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(split_scenes):
        write_image(images / f'{index:06d}.jpg', scene.image)
        write_image(maps / f'{index:06d}.png', semantic_map(scene))


def has_ade20k(out: Path, split: str, count: int) -> bool:
    """Whether the files of a split are there."""
    images, maps = _ade20k_folders(out, split)
    return len(list(images.glob('*.jpg'))) == len(list(maps.glob('*.png'))) == count


def summarise_ade20k(out: Path, split: str) -> dict[str, float]:
    """Numbers that describe a split, by name."""
    _, maps = _ade20k_folders(out, split)
    pixels = np.zeros(len(SEGMENTATION_CLASSES), np.int64)
    images = 0
    for path in sorted(maps.glob('*.png')):
        classes = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        pixels += np.bincount(classes.ravel() - 1, minlength=len(pixels))
        images += 1
    shares = (100 * pixels / max(pixels.sum(), 1)).round(1).tolist()
    names = (f'{name} pixels (%)' for name in SEGMENTATION_CLASSES)
    return {'images': images, **dict(zip(names, shares, strict=True))}


def _ade20k_folders(out: Path, split: str) -> tuple[Path, Path]:
    """Where the images and the maps of a split are."""
    return out / 'images' / ADE20K_SPLITS[split], out / 'annotations' / ADE20K_SPLITS[split]


# ImageNet ------------------------------------------------------------------------------------


def write_imagenet(split_scenes: Iterable[Scene], out: Path, split: str) -> None:
    """Write scenes of one shape each as one split of a classification data set.

    Images go to ``OUT/SPLIT/CLASS/000000.jpg`` and on, numbered through the split. MMPretrain
    numbers classes by the folders' names in alphabetical order and reads them with ::

        dict(type='CustomDataset', data_root=OUT, data_prefix='train', with_label=True)

    Args:
        split_scenes: Scenes of the split; taken one at a time, so an iterator will do.
        out: Folder of the data set.
        split: Name of the split.
    """
    for name in CLASSES:
        (out / split / name).mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(split_scenes):
        (instance,) = scene.instances
        write_image(out / split / CLASSES[instance.label] / f'{index:06d}.jpg', scene.image)


def has_imagenet(out: Path, split: str, count: int) -> bool:
    """Whether the files of a split are there."""
    return sum(summarise_imagenet(out, split)[name] for name in CLASSES) == count


def summarise_imagenet(out: Path, split: str) -> dict[str, float]:
    """Numbers that describe a split, by name."""
    counts = {name: len(list((out / split / name).glob('*.jpg'))) for name in CLASSES}
    return {'images': sum(counts.values()), **counts}


# All -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """One way to lay the data set out.

    Attributes:
        spec: What its images look like by default.
        scenes: The sequence of a split's scenes.
        write: Writes a split: ``(scenes, out, split)``.
        is_whole: Whether all files of a split are there: ``(out, split, count)``.
        summarise: Numbers that describe a split: ``(out, split)``.
        folders: What it makes in the folder of the data set.
    """

    spec: ShapesSpec
    scenes: type[Scenes]
    write: Callable[[Iterable[Scene], Path, str], None]
    is_whole: Callable[[Path, str, int], bool]
    summarise: Callable[[Path, str], dict[str, float]]
    folders: tuple[str, ...]


CENTRED = ShapesSpec(size=(64, 64), objects=(1, 1), shape_size=(40.0, 60.0), spread=0.1)
"""One shape that fills most of the image, among as many distractors as in the scenes of several."""

FORMATS = {
    'coco': Format(
        ShapesSpec(),
        Scenes,
        write_coco,
        has_coco,
        summarise_coco,
        ('train', 'val', 'annotations'),
    ),
    'ade20k': Format(
        ShapesSpec(),
        Scenes,
        write_ade20k,
        has_ade20k,
        summarise_ade20k,
        ('images', 'annotations'),
    ),
    'imagenet': Format(
        CENTRED,
        SingleScenes,
        write_imagenet,
        has_imagenet,
        summarise_imagenet,
        ('train', 'val'),
    ),
}
