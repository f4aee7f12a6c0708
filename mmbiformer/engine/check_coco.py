"""Look into COCO annotation files for what MMDetection reads wrongly, or stumbles over later."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

MAX_BYTES = 10**8
"""Larger files, such as those of COCO's training images, would take long to read once more."""


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
    parts = [content.get(name) for name in PARTS] if isinstance(content, dict) else [None]
    if not all(isinstance(part, list) and all(type(x) is dict for x in part) for part in parts):
        return f'it must be an object with the lists {", ".join(PARTS)}'
    images, annotations, categories = parts
    for name, items in (('image', images), ('category', categories)):
        numbers = Counter(_hashable(item.get('id')) for item in items)
        if twice := [number for number, count in numbers.items() if count > 1]:
            return f'several of its {name} entries have the id {_few(twice)}'
    for name, items in (('image_id', images), ('category_id', categories)):
        known = {_hashable(item.get('id')) for item in items}
        wrong = [a.get(name) for a in annotations if _hashable(a.get(name)) not in known]
        if wrong:
            return f'{len(wrong)} annotations name no entry by {name}, such as {_few(wrong)}'
    if evaluated and not annotations:
        return 'it has no annotations, so there is nothing to evaluate'
    if evaluated and (lacking := sum('iscrowd' not in a for a in annotations)):
        return f'{lacking} annotations lack iscrowd, 0 or 1, which the evaluation needs'
    return None


PARTS = 'images', 'annotations', 'categories'


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, str)) else repr(value)[:80]


def _few(values: Sequence[Any]) -> str:
    return ', '.join(f'{value!r:.80}' for value in values[:3])
