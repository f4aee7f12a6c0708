"""Token labeling (https://arxiv.org/abs/2104.10858) for MMPretrain, which this file imports."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from mmpretrain.models import ImageClassifier, LinearClsHead
from mmpretrain.models.utils.batch_augments import CutMix
from torch import Tensor, nn

from ..errors import UserError
from ..registry import MODELS


class Box(NamedTuple):
    """Rows and columns of tokens that are exchanged with the reversed batch.

    Attributes:
        top: First row.
        bottom: The row after the last one.
        left: First column.
        right: The column after the last one.
        grid: Rows and columns of the whole map.
    """

    top: int
    bottom: int
    left: int
    right: int
    grid: tuple[int, int]

    @property
    def kept(self) -> float:
        """The part of the map that stays."""
        exchanged = (self.bottom - self.top) * (self.right - self.left)
        return 1 - exchanged / (self.grid[0] * self.grid[1])

    def exchange(self, x: Tensor, first: int) -> Tensor:
        """Exchange the box between the images of a batch and those of the reversed batch.

        Done twice, everything is where it was.

        Args:
            x: Maps of a batch, of the box's grid or a finer one.
            first: Dimension of the rows; that of the columns follows.
        """
        # The last token of a map whose size is rounded up stands for fewer pixels.
        rows, columns = (-(-x.shape[first + i] // self.grid[i]) for i in (0, 1))
        place = [slice(None)] * x.ndim
        place[first] = slice(self.top * rows, self.bottom * rows)
        place[first + 1] = slice(self.left * columns, self.right * columns)
        mixed = x.clone()
        mixed[tuple(place)] = x.flip(0)[tuple(place)]
        return mixed


@MODELS.register_module()
class TokenLabelHead(LinearClsHead):
    """Classify the mean of all tokens, and while training each token too.

    The loss is that of the pooled prediction and ``token_loss_weight`` times the mean loss of the
    tokens' predictions. The targets are the softmax over all classes of the scores in
    ``token_target``, which :class:`~mmbiformer.datasets.token_labels.CropLabelMap` makes.
    Predictions are the pooled ones. ``fc`` is the classifier that other heads have too,
    ``token_fc`` that of the tokens.

    Args:
        num_classes: Number of classes, K.
        in_channels: Channels of the backbone's last map, C.
        token_loss_weight: Weight of the tokens' loss; LV-ViT's script has 1, its paper 0.5.
            Defaults to 1.
        **kwargs: Of MMPretrain's ``LinearClsHead``. The loss must take soft labels.

    Raises:
        UserError: In ``loss``, if targets do not fit the map or the classes.
    """

    def __init__(
        self, num_classes: int, in_channels: int, token_loss_weight: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, in_channels, **kwargs)
        self.token_fc = nn.Linear(in_channels, num_classes)
        self.token_loss_weight = token_loss_weight

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """The mean of the last map (B, C, H, W) over its tokens, (B, C)."""
        return feats[-1].mean((2, 3))

    def loss(
        self, feats: Sequence[Tensor], data_samples: list[Any], box: Box | None = None
    ) -> dict[str, Tensor]:
        """Compute both losses.

        Args:
            feats: Maps; the last one is (B, C, H, W).
            data_samples: With ``token_target``.
            box: What MixToken has exchanged. Defaults to None: nothing.

        Returns:
            dict[str, Tensor]: ``loss_pooled`` and ``loss_token``.
        """
        x = feats[-1]
        if x.ndim != 4:
            raise UserError(
                f'TokenLabelHead needs a map (B, C, H, W), the backbone gives {tuple(x.shape)}; '
                'leave out the neck, and set what the backbone returns to its map'
            )
        pooled_target, token_target = self.targets(data_samples, tuple(x.shape[2:]), x.device)
        token_scores = self.token_fc(x.permute(0, 2, 3, 1))
        if box is not None:
            token_scores = box.exchange(token_scores, 1)
            pooled_target = box.kept * pooled_target + (1 - box.kept) * pooled_target.flip(0)
        pooled = self.loss_module(self(feats), pooled_target, avg_factor=len(x))
        tokens = token_scores.flatten(0, 2)
        token = self.loss_module(tokens, token_target.flatten(0, 2), avg_factor=len(tokens))
        return dict(loss_pooled=pooled, loss_token=self.token_loss_weight * token)

    def targets(
        self, data_samples: list[Any], size: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Probabilities of the classes for whole crops, (B, K), and for tokens, (B, H, W, K)."""
        targets = [sample.token_target for sample in data_samples]
        for sample, target in zip(data_samples, targets, strict=True):
            name = sample.get('img_path', 'an image')
            if target.tokens.shape[1:] != size:
                raise UserError(
                    f'the last map has {size[0]}x{size[1]} tokens, the label map of {name} was '
                    f'cropped to {"x".join(map(str, target.tokens.shape[1:]))}; set tokens={size} '
                    'in CropLabelMap'
                )
            if target.classes[-1] >= self.num_classes:
                raise UserError(
                    f'the label map of {name} has class {target.classes[-1]}, the head has '
                    f'{self.num_classes} classes from 0; make the maps with a classifier of the '
                    'same classes'
                )
        images = np.repeat(np.arange(len(targets)), [len(target.classes) for target in targets])
        classes = np.concatenate([target.classes for target in targets])
        scores = [
            np.column_stack([each.pooled, each.tokens.reshape(len(each.classes), -1)])
            for each in targets
        ]
        images, classes, scores = (
            torch.from_numpy(each).to(device) for each in (images, classes, np.concatenate(scores))
        )
        dense = scores.new_zeros(len(targets), self.num_classes, scores.shape[1])
        dense[images, classes] = scores
        dense = dense.softmax(1).transpose(1, 2)  # (B, 1 + H * W, K)
        return dense[:, 0], dense[:, 1:].unflatten(1, size)


@MODELS.register_module()
class TokenLabelClassifier(ImageClassifier):
    """MMPretrain's ``ImageClassifier`` with MixToken, for :class:`TokenLabelHead`.

    While training, a box of tokens is exchanged between each batch and the reversed batch, after
    the images became tokens. It is drawn on the grid of the backbone's last map, so that each token
    there is of one image.

    Args:
        *args: Of ``ImageClassifier``.
        mix_token: Alpha of the Beta distribution from which the box's area is drawn; None for no
            MixToken. Defaults to 1.
        embedding: Name of the backbone's module that makes tokens of images, and the dimension of
            their rows. Defaults to None: that of our backbones. Others need it for MixToken.
        **kwargs: Of ``ImageClassifier``.

    Raises:
        UserError: If MixToken needs ``embedding``.
    """

    def __init__(
        self,
        *args: Any,
        mix_token: float | None = 1.0,
        embedding: tuple[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mixing = None
        if mix_token is not None:
            self.mixing = CutMix(alpha=float(mix_token))
            embedding = embedding or getattr(self.backbone, 'embedding', None)
            if embedding is None:
                raise UserError(
                    f'MixToken needs to know where {type(self.backbone).__name__} makes tokens: '
                    "set embedding=(NAME_OF_MODULE, DIMENSION_OF_ROWS), such as ('patch_embed', 2) "
                    'for (B, C, H, W), or mix_token=None'
                )
            self.embedding, self.first_dim = embedding

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            inputs: Images (B, 3, H, W).
            data_samples: With ``token_target``.
        """
        box = None
        if self.mixing is not None:
            box = self.draw_box(data_samples[0].token_target.tokens.shape[1:])
        with self.mixed(box):
            feats = self.extract_feat(inputs)
        return self.head.loss(feats, data_samples, box=box)

    def draw_box(self, grid: tuple[int, int]) -> Box:
        """Draw a box as CutMix does."""
        # NumPy's random numbers, as MMPretrain's CutMix.
        area = np.random.beta(self.mixing.alpha, self.mixing.alpha)
        sides, _ = self.mixing.cutmix_bbox_and_lam(grid, area)
        return Box(*map(int, sides), grid=tuple(grid))

    @contextmanager
    def mixed(self, box: Box | None) -> Iterator[None]:
        """Exchange the box wherever the backbone makes tokens of images."""
        if box is None:
            yield
            return
        module = self.backbone.get_submodule(self.embedding)

        def exchange(module: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
            return box.exchange(tokens, self.first_dim)

        handle = module.register_forward_hook(exchange)
        try:
            yield
        finally:
            handle.remove()
