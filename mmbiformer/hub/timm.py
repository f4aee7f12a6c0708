"""Importing this makes ``timm.create_model('biformer_small')`` work, as timm's own models do."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from mmengine.runner import CheckpointLoader
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import (
    build_model_with_cfg,
    clean_state_dict,
    generate_default_cfgs,
    load_pretrained,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.base import families, listed
from ..models.hierarchical import HierarchicalBackbone

STEM = 'downsample_layers.0.0'


class HierarchicalClassifier(nn.Module):
    """A backbone of ours with a classifier, as timm's models are.

    Names of parameters are those of an mmpretrain ``ImageClassifier``: ``backbone.…`` and
    ``head.fc.…``. With ``features_only=True`` timm gives the stages' maps as they are, as from its
    own models: no norm follows, since those of the dense tasks are not trained on ImageNet.

    Example:
        >>> import timm, torch
        >>> import mmbiformer.hub.timm
        >>> net = timm.create_model('debiformer_tiny', features_only=True, out_indices=(1, 3))
        >>> [tuple(each.shape) for each in net(torch.randn(2, 3, 64, 96))]
        [(2, 128, 8, 12), (2, 512, 2, 3)]

    Args:
        family: The class of the backbone.
        arch: Its arch.
        num_classes: Number of classes; 0 for pooled features. Defaults to 1000.
        global_pool: timm's name of the pooling, '' for none. Defaults to ``'avg'``.
        drop_rate: Dropout before the classifier. Defaults to 0.
        in_chans: Channels of the images. Defaults to 3.
        device: Where the model goes. Defaults to None: as PyTorch says.
        dtype: Its type. Defaults to None: as PyTorch says.
        **kwargs: Arguments of the backbone, such as ``region_grid`` and ``drop_path_rate``.
    """

    def __init__(
        self,
        family: type[HierarchicalBackbone],
        arch: str,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.backbone = family(arch, final_norm=True, in_channels=in_chans, **kwargs)
        dims = self.backbone.arch['embed_dims']
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f'backbone.stages.{i}')
            for i, dim in enumerate(dims)
        ]
        self.to(device=device, dtype=dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map, (B, C, H / 32, W / 32), of images (B, in_chans, H, W)."""
        return self.backbone(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify a map: (B, num_classes), or (B, C) with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the maps of stages.

        Args:
            x: Images of shape (B, in_chans, H, W).
            indices: Stages: the last n, a list of numbers, or None for all. Defaults to None.
            norm: Whether the last stage's map passes the final norm. Defaults to False.
            stop_early: Whether to leave out stages after the last that is asked for.
            output_fmt: ``'NCHW'``.
            intermediates_only: Whether to give the maps alone.

        Returns:
            list[Tensor] | tuple[Tensor, list[Tensor]]: The maps (B, C, H / s, W / s), or the final
            map and they. Maps are contiguous.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW'")
        backbone, last = self.backbone, len(self.backbone.stages) - 1
        taken, most = feature_take_indices(last + 1, indices)
        x, maps = backbone.prepare(x), []
        for i in range(most + 1 if stop_early else last + 1):
            x = backbone.run_stage(i, x)
            if i in taken:
                maps.append((backbone.norm(x) if norm and i == last else x).contiguous())
        if intermediates_only:
            return maps
        return (backbone.norm(x) if i == last else x).contiguous(), maps

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the maps of these stages do not need; returns the stages' numbers.

        Args:
            indices: Stages: the last n, or a list of numbers.
            prune_norm: Whether to drop the final norm.
            prune_head: Whether to drop the classifier.
        """
        backbone = self.backbone
        taken, most = feature_take_indices(len(backbone.stages), indices)
        shorter = most + 1 < len(backbone.stages)
        backbone.stages = backbone.stages[: most + 1]
        backbone.downsample_layers = backbone.downsample_layers[: most + 1]
        if prune_norm or shorter:
            backbone.norm = nn.Identity()
        self.num_features = self.head_hidden_size = self.feature_info[most]['num_chs']
        if prune_head or shorter:
            self.reset_classifier(0, '')
        return taken

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new last layer.

        Args:
            num_classes: Number of classes; 0 for pooled features.
            global_pool: timm's name of the pooling. Defaults to None: as it is.
        """
        self.num_classes = num_classes
        self.head.in_features = self.num_features
        self.head.reset(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass, or keep what it computes."""
        self.backbone.with_cp = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Say which parameters make a layer, for layer-wise learning rates.

        Args:
            coarse: Whether a stage is one layer. Defaults to False: each block is one, a stage's
                first with the downsampling before it.

        Returns:
            dict[str, Any]: Patterns of names, as timm takes them.
        """
        blocks = [
            (r'^backbone\.downsample_layers\.(\d+)', (0,)),
            (r'^backbone\.stages\.(\d+)\.(\d+)', None),
        ]
        stages = r'^backbone\.(?:downsample_layers|stages)\.(\d+)'
        return dict(stem=r'^backbone\.downsample_layers\.0', blocks=stages if coarse else blocks)

    def load_pretrained(self, checkpoint_path: str) -> None:
        """Load a file: timm calls this for every ``file`` and ``url``.

        Our reader takes what is in the authors' files beside weights, which timm's refuses.

        Args:
            checkpoint_path: An authors' file, one of ours, or one of mmpretrain or timm.

        Raises:
            CheckpointError: If its backbone does not fit this model.
        """
        path = str(checkpoint_path)
        checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent')
        weights = clean_state_dict(checkpoint.get('state_dict', checkpoint))
        load_pretrained(
            self,
            dict(self.pretrained_cfg, state_dict=weights),
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            filter_fn=partial(checkpoint_filter_fn, source=path),
            strict=False,  # a backbone alone has no classifier; the filter checks the backbone
        )


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any],
    model: HierarchicalClassifier,
    source: str = 'the state dict',
) -> dict[str, Any]:
    """Give weights of a file the names of a model.

    Args:
        state_dict: Names and tensors: the authors', ours, or those of a backbone alone.
        model: The model.
        source: Where they are from, for the message.

    Returns:
        dict[str, Any]: The same tensors, under ``backbone.…`` and ``head.fc.…``.

    Raises:
        CheckpointError: If the backbone does not fit the model.
    """
    backbone = model.backbone
    if backbone.is_released(state_dict):
        state_dict = backbone.convert_released(state_dict)
    if not any(name.startswith('backbone.') for name in state_dict):
        state_dict = {
            name if name.startswith('head.') else f'backbone.{name}': value
            for name, value in state_dict.items()
        }
    given = {name.removeprefix('backbone.'): state_dict[name] for name in state_dict}
    problems = backbone.problems_with(given)
    if model.in_chans != 3:  # timm adapts the first convolution
        problems = [each for each in problems if not each.startswith(f'{STEM}.weight is (')]
    if problems:
        family = type(backbone).__name__
        raise CheckpointError(
            f'{source} does not fit this {family}: {listed(problems)}. Choose the model of the '
            'file or another file'
        )
    return dict(state_dict)


def _cfg(family: type[HierarchicalBackbone], name: str, arch: str) -> dict[str, Any]:
    """Give timm the facts about a model's weights and the images that they expect."""
    url = family.released.get(arch)
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
        first_conv=f'backbone.{STEM}',
        classifier='head.fc',
        origin_url=family.authors_page,
    )


def _create(
    family: type[HierarchicalBackbone],
    arch: str,
    name: str,
    pretrained: bool = False,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    return build_model_with_cfg(
        partial(HierarchicalClassifier, family, arch),
        name,
        pretrained,
        pretrained_cfg_overlay=dict(pretrained_cfg_overlay or {}, custom_load=True),
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
        **kwargs,
    )


def _entry_point(family: type[HierarchicalBackbone], arch: str, name: str) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(family, arch, name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'{family.__name__}, arch {arch!r}; see :class:`HierarchicalClassifier`.'
    return create


MODELS = {
    f'{family.__name__.lower()}_{arch}': (family, arch)
    for family in families()
    if issubclass(family, HierarchicalBackbone)
    for arch in family.archs
}
default_cfgs = generate_default_cfgs(
    {f'{name}.in1k': _cfg(family, name, arch) for name, (family, arch) in MODELS.items()}
)
# timm takes one function for each model, and adds its name to __all__.
for name, (family, arch) in MODELS.items():
    globals()[name] = register_model(_entry_point(family, arch, name))
