"""Backbones that give maps of several sizes, as timm's models."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ...models.hierarchical import HierarchicalBackbone
from .classifier import Classifier


class HierarchicalClassifier(Classifier):
    """A backbone with a pooled last map and a classifier.

    With ``features_only=True`` timm gives the stages' maps as they are, as from its own models: no
    norm follows, since those of the dense tasks are not trained on ImageNet.

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
        super().__init__(num_classes, in_chans)
        self.backbone = family(arch, final_norm=True, in_channels=in_chans, **kwargs)
        dims = self.backbone.arch['embed_dims']
        self.num_features = self.head_hidden_size = dims[-1]
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f'backbone.stages.{i}')
            for i, dim in enumerate(dims)
        ]
        self.to(device=device, dtype=dtype)

    @staticmethod
    def first_conv(arch: Mapping[str, Any]) -> str:
        return 'downsample_layers.0.0'

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map, (B, C, H / 32, W / 32), of images (B, in_chans, H, W)."""
        return self.backbone(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify a map: (B, num_classes), or (B, C) with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

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

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new last layer.

        Args:
            num_classes: Number of classes; 0 for pooled features.
            global_pool: timm's name of the pooling. Defaults to None: as it is.
        """
        self.num_classes = num_classes
        self.head.in_features = self.num_features
        self.head.reset(num_classes, global_pool)

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
