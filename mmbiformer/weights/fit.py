"""Whether the weights in a file fit a whole model around a backbone of ours."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ..errors import CheckpointError, escaped
from ..models.base import Backbone, listed, misfits
from .names import unnest


def load_whole_model(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of a whole model.

    Args:
        path: Path or URL.

    Returns:
        dict[str, Any]: The checkpoint. Its weights are under ``state_dict`` in any case; those of
        an authors' file have our names.

    Raises:
        CheckpointError: If it holds no weights by name.
    """
    checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location='cpu', logger='silent')
    weights = unnest(checkpoint)
    named = isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights)
    if not named or not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f'{path} holds a {type(weights).__name__}, not weights by name; give a checkpoint of a '
            "training, or one of the authors' files"
        )
    rest = dict(meta={}) if weights is checkpoint else checkpoint
    return {**rest, 'state_dict': weights}


def check_fit(model: nn.Module, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Raise CheckpointError unless a checkpoint holds all weights of a model, in its shapes.

    MMEngine only logs what does not fit, and goes on with random weights.

    Args:
        model: The model; wrappers are looked through.
        checkpoint: A loaded checkpoint, or its weights by name.
        path: Where it was loaded from, for the message.
    """
    given, model = _given(checkpoint), _unwrapped(model)
    problems = misfits(model.state_dict(), given)
    for prefix, backbone in _backbones(model):
        # A larger arch may have all names of a smaller one.
        problems = problems or _problems(backbone, given, prefix)
    _refuse(problems, path)


def check_backbones(model: nn.Module, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Raise CheckpointError unless the backbones of ours in a model find their weights.

    Necks and heads may be new, as where a detector is trained further on other classes. The file
    may hold the backbone under another name: mmdet's SoftTeacher, whose backbones are
    ``student.backbone`` and ``teacher.backbone``, takes the weights of a plain detector.

    Args:
        model: The model; wrappers are looked through.
        checkpoint: A loaded checkpoint, or its weights by name.
        path: Where it was loaded from, for the message.
    """
    given = _given(checkpoint)
    for place, backbone in _backbones(_unwrapped(model)):
        prefix = _prefix(backbone.state_dict(), given, place)
        _refuse(_problems(backbone, given, prefix), path)


def _backbones(model: nn.Module) -> Iterator[tuple[str, Backbone]]:
    """Yield the backbones of ours in a model, each with its name and a dot."""
    for place, module in model.named_modules():
        if isinstance(module, Backbone):
            yield f'{place}.' if place else '', module


def _problems(backbone: Backbone, given: Mapping[str, Any], prefix: str) -> list[str]:
    found = {
        name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)
    }
    return [f'{prefix}{problem}' for problem in backbone.problems_with(found)]


def _prefix(own: Mapping[str, Tensor], given: Mapping[str, Any], place: str) -> str:
    """The backbone's name in a file, with a dot: its own, or another that has its weights."""
    if any(f'{place}{name}' in given for name in own):
        return place
    for name in own:
        for other in given:
            if other.endswith(f'.{name}'):
                return other.removesuffix(name)
    return place


def _refuse(problems: list[str], path: str | Path) -> None:
    if problems:
        raise CheckpointError(
            f'{path} does not fit the model of the config: {escaped(listed(problems))}. Take the '
            'config that it was trained with, or another checkpoint'
        )


def _given(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix('module.'): value for name, value in unnest(checkpoint).items()}


def _unwrapped(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
