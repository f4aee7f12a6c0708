"""The data set as COCO instances."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from .images import write_image
from .scenes import Instance, Scene, tight_box
from .spec import CLASSES, GENERATOR, VERSION

FOLDERS = ('train', 'val', 'annotations')

MIN_POLYGON_IOU = 0.9
"""A mask whose polygon overlaps it less than this is written as run lengths."""

POLYGON_TOLERANCE = 0.5
"""How far a polygon may deviate from the mask's outline, in pixels; it saves points."""


def _outline_polygon(mask: np.ndarray) -> list[float] | None:
    """Outline of a mask as ``[x0, y0, x1, y1, ...]``, ``None`` if it is not a single loop."""
    x, y, width, height = tight_box(mask)
    crop = mask[y : y + height, x : x + width].astype(np.uint8)
    # OpenCV's contours run through pixel centres and lose half a pixel all around; enlarging the
    # mask makes that small.
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
        One polygon where that is faithful. Masks with holes, of several parts or too small for a
        polygon become compressed run lengths, which are exact.
    """
    # Imported here: drawing scenes does not need the COCO tools.
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

    It also has the instance's ``size`` and ``occlusion``, which readers of COCO files ignore.
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


def write(split_scenes: Iterable[Scene], out: Path, split: str) -> None:
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
        split_scenes: Scenes of the split; an iterator will do.
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


def is_whole(out: Path, split: str, count: int) -> bool:
    """Whether all files of a split are there."""
    images = len(list((out / split).glob('*.jpg')))
    return (out / 'annotations' / f'instances_{split}.json').is_file() and images == count


SIZE_BINS = (16, 32)
"""Edges in pixels between the small, medium and large shapes of the summary."""


def summarise(out: Path, split: str) -> dict[str, float]:
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
