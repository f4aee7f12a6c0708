"""Importing this makes ``timm.create_model('biformer_small')`` work, as timm's own models do."""

from functools import partial
from typing import Any
from urllib.error import URLError

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ...errors import CheckpointError
from ...models import BiXT
from ...models.base import Backbone, families
from ...models.hierarchical import HierarchicalBackbone
from .bixt import BiXTClassifier
from .classifier import Classifier, checkpoint_filter_fn
from .hierarchical import HierarchicalClassifier

KINDS: dict[type[Backbone], type[Classifier]] = {
    HierarchicalBackbone: HierarchicalClassifier,
    BiXT: BiXTClassifier,
}


def _kind(family: type[Backbone]) -> type[Classifier] | None:
    """How a family classifies; None if timm does not know it."""
    return next((kind for base, kind in KINDS.items() if issubclass(family, base)), None)


def _cfg(family: type[Backbone], name: str, arch: str) -> dict[str, Any]:
    """Give timm the facts about a model's weights and the images that they expect."""
    kind, url = _kind(family), family.released.get(arch)
    return dict(
        # The authors' addresses all end alike, so timm is told the name for its cache.
        url=(url, f'{name}_in1k.pth') if url else '',
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation='bicubic',
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv=f'backbone.{kind.first_conv(family.archs[arch])}',
        classifier='head.fc',
        origin_url=family.authors_page,
    )


def _create(
    family: type[Backbone],
    arch: str,
    name: str,
    pretrained: bool = False,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    try:
        return build_model_with_cfg(
            partial(_kind(family), family, arch),
            name,
            pretrained,
            pretrained_cfg_overlay=dict(pretrained_cfg_overlay or {}, custom_load=True),
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=_kind(family).num_maps, feature_cls='getter'),
            **kwargs,
        )
    except URLError as error:
        raise CheckpointError(
            f'the weights of {name} cannot be downloaded: {error}. Download the file from '
            f'{family.authors_page} and give its path: pretrained=True, '
            'pretrained_cfg_overlay=dict(file=PATH)'
        ) from error


def _entry_point(family: type[Backbone], arch: str, name: str) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(family, arch, name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'{family.__name__}, arch {arch!r}; see :class:`Classifier`.'
    return create


MODELS = {
    f'{family.__name__.lower()}_{arch}': (family, arch)
    for family in families()
    if _kind(family)
    for arch in family.archs
}
default_cfgs = generate_default_cfgs(
    {f'{name}.in1k': _cfg(family, name, arch) for name, (family, arch) in MODELS.items()}
)
# timm takes one function for each model, and adds its name to __all__.
for name, (family, arch) in MODELS.items():
    globals()[name] = register_model(_entry_point(family, arch, name))
