"""Names of weights in files: where they are nested, and whose they are.

The families of backbones know their authors' names. Ours are those of an mmpretrain
``ImageClassifier``: ``backbone.…`` and ``head.fc.…``.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, escaped
from ..models.base import Backbone, families

# DistributedDataParallel and torch.compile put these before the names.
_WRAPPERS = re.compile(r'^(?:module\.|_orig_mod\.)+')


def unnest(checkpoint: Any) -> Any:
    """The weights by name in a loaded file: under ``state_dict``, under ``model``, or bare."""
    for name in ('state_dict', 'model'):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(name), Mapping):
            return checkpoint[name]
    return checkpoint


def is_released(checkpoint: Any) -> bool:
    """Whether a loaded file holds a model of a family of ours under its authors' names."""
    return _family(_split(checkpoint)[0]) is not None


def convert_released(checkpoint: Any) -> 'OrderedDict[str, Tensor]':
    """Rename the authors' parameters to ours.

    Args:
        checkpoint: A loaded file. The authors' names and tensors may be bare, or under ``model`` or
            ``state_dict``; the backbone may be alone, with a classification head, or under
            ``backbone.`` in a whole detector or segmentor.

    Returns:
        OrderedDict[str, Tensor]: The same tensors under ``backbone.…`` and ``head.fc.…``. Other
        parts of a whole detector or segmentor keep their names.

    Raises:
        CheckpointError: If these are not a family's names.
    """
    weights, others = _split(checkpoint)
    family = _family(weights)
    if family is None:
        known = ', '.join(f'{each.__name__} ({each.authors_page})' for each in _released_families())
        raise CheckpointError(
            "these are not the weights of a released model under its authors' names: found "
            + escaped(f'{[name[:80] for name in sorted(weights)[:3]]} of {len(weights)} names; ')
            + f'known are {known}'
        )
    converted = OrderedDict()
    for name, value in family.convert_released(weights).items():
        converted[name if name.startswith('head.') else f'backbone.{name}'] = value
    return OrderedDict(**converted, **others)


def _split(checkpoint: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Bare names of the backbone, or of a whole classifier, and those of other parts."""
    found = unnest(checkpoint)
    weights = {
        _WRAPPERS.sub('', name): value
        for name, value in (found.items() if isinstance(found, Mapping) else ())
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    inside = [name for name in weights if name.startswith('backbone.')]
    if not inside:
        return weights, {}
    bare = {name.removeprefix('backbone.'): weights.pop(name) for name in inside}
    return bare, weights


def _family(weights: Mapping[str, Tensor]) -> type[Backbone] | None:
    for family in _released_families():
        if family.is_released(weights):
            return family
    return None


def _released_families() -> list[type[Backbone]]:
    return [each for each in families() if each.authors_page]
