"""The common base of our models in timm: a backbone and a classifier."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

from mmengine.runner import CheckpointLoader
from timm.models import clean_state_dict, load_pretrained
from torch import Tensor, nn

from ...errors import CheckpointError
from ...models.base import Backbone, listed


class Classifier(nn.Module, ABC):
    """A backbone of ours with a classifier, as timm's models are.

    Names of parameters are those of an mmpretrain ``ImageClassifier``: ``backbone.…`` and
    ``head.fc.…``. A family's class builds both and takes timm's arguments; with
    ``features_only=True`` timm gives the maps of :meth:`forward_intermediates` as they are.

    Args:
        num_classes: Number of classes; 0 for pooled features.
        in_chans: Channels of the images.

    Attributes:
        backbone (Backbone): The backbone.
        head (nn.Module): The classifier; its last layer is ``head.fc``.
        num_maps (int): Maps that ``features_only`` gives if none are chosen.
    """

    backbone: Backbone
    head: nn.Module
    num_maps = 4

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans

    @staticmethod
    @abstractmethod
    def first_conv(arch: Mapping[str, Any]) -> str:
        """The name of the layer, in the backbone of an arch, that sees the images."""

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Compute what the classifier pools, of images (B, in_chans, H, W)."""

    @abstractmethod
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify: (B, num_classes), or (B, C) with ``pre_logits``."""

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass, or keep what it computes."""
        self.backbone.with_cp = enable

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
    model: 'Classifier',
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
        adapted = f'{model.first_conv(backbone.arch)}.weight is ('
        problems = [each for each in problems if not each.startswith(adapted)]
    if problems:
        family = type(backbone).__name__
        raise CheckpointError(
            f'{source} does not fit this {family}: {listed(problems)}. Choose the model of the '
            'file or another file'
        )
    return dict(state_dict)
