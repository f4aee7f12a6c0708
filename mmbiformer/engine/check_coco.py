"""Look into COCO annotation files for what MMDetection reads wrongly, or stumbles over later."""

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_BYTES = 10**8
"""Larger files, such as those of COCO's training images, would take long to read once more."""
FAR = 100
"""How many times the image's longer side a point of a polygon may be away."""


def check_coco(path: str, evaluated: bool) -> str | None:
    """Say what is wrong with a COCO annotation file; None if nothing is.

    Args:
        path: A local file; others, and such as are larger than :data:`MAX_BYTES`, are not read.
        evaluated: Whether metrics are computed from it, which needs ``iscrowd``.
    """
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_BYTES:
        return None
    with open(path, encoding='utf-8') as file:
        try:
            content = json.load(file)
        except ValueError as error:
            return f'it is no JSON: {error}'
        except RecursionError:
            return 'its JSON is nested too deeply'
    if isinstance(content, dict) and not evaluated:
        content.setdefault('annotations', [])  # COCO's test images have none
    parts = [content.get(name) for name in PARTS] if isinstance(content, dict) else [None]
    if not all(isinstance(part, list) and all(type(x) is dict for x in part) for part in parts):
        return f'it must be an object with the lists {", ".join(PARTS)}'
    images, annotations, categories = parts
    for name, items in zip(('image', 'annotation', 'category'), parts, strict=True):
        numbers = Counter(_hashable(item.get('id')) for item in items)
        if None in numbers:
            return f'{numbers[None]} of its {name} entries have no id'
        if twice := [number for number, count in numbers.items() if count > 1]:
            return f'several of its {name} entries have the id {_few(twice)}'
    if nameless := [c['id'] for c in categories if type(c.get('name')) is not str]:
        return f'its categories {_few(nameless)} have no name'
    for name, items in (('image_id', images), ('category_id', categories)):
        known = {_hashable(item['id']) for item in items}
        wrong = [a.get(name) for a in annotations if _hashable(a.get(name)) not in known]
        if wrong:
            return f'{len(wrong)} annotations name no entry by {name}, such as {_few(wrong)}'
    for image in images:
        if reason := _wrong_image(image):
            return f'its image {image["id"]!r:.80} {reason}'
    sizes = {_hashable(image['id']): (image['height'], image['width']) for image in images}
    for annotation in annotations:
        if reason := _wrong_annotation(annotation, sizes[_hashable(annotation['image_id'])]):
            return f'its annotation {annotation["id"]!r:.80} {reason}'
    if evaluated and not annotations:
        return 'it has no annotations, so there is nothing to evaluate'
    if evaluated and (lacking := sum('iscrowd' not in a for a in annotations)):
        return f'{lacking} annotations lack iscrowd, 0 or 1, which the evaluation needs'
    if evaluated and any(a['id'] == 0 for a in annotations):
        warnings.warn(
            f'{path}: the evaluation counts the annotation of the id 0 as missed, as pycocotools '
            'takes 0 for none; number annotations from 1',
            stacklevel=2,
        )
    return None


PARTS = 'images', 'annotations', 'categories'


def _hashable(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, str)) else repr(value)[:80]


def _wrong_image(image: dict[str, Any]) -> str | None:
    name, size = image.get('file_name'), [image.get('height'), image.get('width')]
    if type(name) is not str or not name or '\0' in name:
        return f'needs the name of a file as file_name, not {name!r:.80}'
    if not _are_finite(size) or min(size) <= 0:
        return f'needs height and width in pixels, not {size[0]!r:.80} and {size[1]!r:.80}'
    return None


def _wrong_annotation(annotation: dict[str, Any], size: tuple[float, float]) -> str | None:
    box, area, crowd = (annotation.get(name) for name in ('bbox', 'area', 'iscrowd'))
    if not isinstance(box, list) or len(box) != 4 or not _are_finite(box):
        return f'needs a bbox of 4 finite numbers, x, y, width and height, not {box!r:.80}'
    if not _are_finite([area]):
        return f'needs its area in pixels, not {area!r:.80}'
    if crowd not in (None, 0, 1):
        return f'needs 0 or 1 as iscrowd, not {crowd!r:.80}'
    mask = annotation.get('segmentation')
    if isinstance(mask, dict):
        return _wrong_runs(mask.get('counts'), mask.get('size'), size)
    for polygon in mask if isinstance(mask, list) else ():
        if not isinstance(polygon, list) or not polygon or not _are_numbers(polygon):
            continue  # no polygon for MMDetection either
        # pycocotools walks along an outline pixel by pixel, wherever it is; 1e9 crashes it.
        if not _are_finite(polygon) or max(map(abs, polygon)) > FAR * max(size):
            return 'has a polygon with points that are not finite, or far outside of its image'
    return None


def _wrong_runs(counts: Any, own: Any, size: tuple[float, float]) -> str | None:
    """Runs that fill less than the image leave pycocotools with what was in memory before."""
    if own != [*size]:
        return f'has a mask of the size {own!r:.80} for an image of {[*size]}, height and width'
    if isinstance(counts, str):
        counts = _decoded(counts)
    whole = isinstance(counts, list) and _are_finite(counts) and min(counts, default=0) >= 0
    if not whole or sum(counts) != size[0] * size[1]:
        return f'has a damaged mask: the runs of its counts do not fill {size[0]}x{size[1]} pixels'
    return None


def _decoded(counts: str) -> list[int] | None:
    """Lengths of runs from COCO's string of them; None if it is none."""
    # Numbers in digits of 5 bits, the lowest first; a bit of 32 says that more follow.
    digits = np.frombuffer(counts.encode(errors='replace'), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 32 == 0)
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or ends[-1:] != len(digits) - 1:
        return None
    starts = np.append(0, ends[:-1] + 1)
    places = np.arange(len(digits)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 10:
        return None
    numbers = np.add.reduceat((digits & 31) << 5 * places, starts)
    numbers -= np.where(digits[ends] & 16, 1 << 5 * (places[ends] + 1), 0)
    # From the fourth on they are what the run is longer than the one before the last.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers.tolist()


def _are_numbers(values: list[Any]) -> bool:
    return {*map(type, values)} <= {int, float}


def _are_finite(values: list[Any]) -> bool:
    return _are_numbers(values) and all(map(math.isfinite, values))


def _few(values: Sequence[Any]) -> str:
    return ', '.join(f'{value!r:.80}' for value in values[:3])
