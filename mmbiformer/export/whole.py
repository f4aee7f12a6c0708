"""Whole models: from a decoded image to classes, labels, or boxes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import UserError
from .detector import Detector
from .graph import Exportable
from .images import Images

RESIZES = {'Resize', 'ResizeEdge', 'CenterCrop', 'ResizeToMultiple'}
"""Steps of a test pipeline that change an image's size."""
KEPT = 'scale', 'keep_ratio', 'edge', 'crop_size', 'size_divisor', 'interpolation', 'backend'


class WholeModel(Exportable):
    """A model with the normalization before it and the post-processing behind it.

    Args:
        model: A classifier, segmentor or detector of the hosts around a backbone of this package;
            changed in place.
        settings: The ``data_preprocessor`` of its config.
        canvas: Height and width of what the network sees, in pixels. Images of detectors and
            segmentors may be smaller, and are padded at the right and bottom.

    Attributes:
        task (str): ``'classification'``, ``'segmentation'`` or ``'detection'``.
        output_names (list[str]): ``['logits']`` (B, classes); ``['labels']`` (B, H, W); or
            ``['boxes', 'scores', 'labels']``, and ``'masks'``, see :class:`Detector`.

    Raises:
        UserError: If the model is of another kind.
    """

    def __init__(
        self, model: nn.Module, settings: Mapping[str, Any], canvas: tuple[int, int]
    ) -> None:
        super().__init__(model, any_size=False)
        self.images, self.canvas = Images.of(settings, canvas), canvas
        self.predict: nn.Module
        if hasattr(model, 'decode_head'):
            self.task, self.predict = 'segmentation', Segmentor(model)
        elif hasattr(model, 'bbox_head') or hasattr(model, 'roi_head'):
            self.task, self.predict = 'detection', Detector(model, canvas)
        elif hasattr(model, 'head'):
            self.task, self.predict = 'classification', Classifier(model)
        else:
            raise UserError(
                f'{type(model).__name__} is no classifier, segmentor or detector; export its '
                'feature maps by --backbone'
            )
        self.output_names = self.predict.output_names
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """RGB images (B, H, W, 3), uint8, to the outputs; detectors take one image."""
        return self.predict(self.images(images), *images.shape[1:3])

    def axes(self, name: str) -> tuple[str, ...]:
        """Names of the axes of an input or output."""
        if self.task == 'detection' and name != 'images':
            return 'count', 'height', 'width'
        return 'batch', 'height', 'width', 'channels'

    def sample(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """A random image, to check a file with; smaller than the canvas where it may be."""
        height, width = size
        if self.task != 'classification':
            height, width = max(height - 7, 1), max(width - 13, 1)
        image = torch.randint(256, (1, height, width, 3), generator=generator)
        return image.to(torch.uint8)

    def example(self) -> tuple[Tensor, dict[int, Any]]:
        """Images to trace with, and which axes are open."""
        height, width = self.canvas
        if self.task == 'classification':
            return torch.zeros(2, height, width, 3, dtype=torch.uint8), {0: Dim.DYNAMIC}
        sides = {1: Dim('height', min=1, max=height), 2: Dim('width', min=1, max=width)}
        batch = {} if self.task == 'detection' else {0: Dim.DYNAMIC}
        count = 2 if batch else 1
        images = torch.zeros(count, height - 1, width - 1, 3, dtype=torch.uint8)
        return images, batch | sides


class Classifier(nn.Module):
    """Logits of MMPretrain's classifiers."""

    output_names = ('logits',)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor]:
        """(B, 3, H, W) to (B, classes)."""
        return (self.model(x, mode='tensor'),)


class Segmentor(nn.Module):
    """Labels of MMSegmentation's encoder-decoders, of the image as a whole."""

    output_names = ('labels',)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if model.test_cfg.get('mode', 'whole') != 'whole':
            raise UserError(
                f'test_cfg.mode={model.test_cfg.mode!r} cuts images into windows; set '
                "model.test_cfg.mode='whole' to export, and give --shape"
            )
        self.model = model

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor]:
        """(B, 3, H, W) to labels (B, height, width)."""
        head = self.model.decode_head
        logits = head(self.model.extract_feat(x))
        logits = F.interpolate(
            logits, x.shape[2:], mode='bilinear', align_corners=self.model.align_corners
        )
        if head.out_channels > 1:
            labels = logits.argmax(1)
        else:
            labels = (logits.sigmoid() > head.threshold).long()[:, 0]
        # A slice would ask whether anything is cut off.
        rows, cols = torch.arange(height), torch.arange(width)
        return (labels.index_select(1, rows).index_select(2, cols),)


def trace_whole(net: WholeModel) -> ExportedProgram:
    """Make the graph of a whole model.

    Args:
        net: What is exported.
    """
    images, axes = net.example()
    with torch.no_grad():
        return torch.export.export(net, (images,), dynamic_shapes={'images': axes})


def describe(net: WholeModel, cfg: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Describe a file as JSON, for programs that run it.

    Args:
        net: What is exported.
        cfg: The whole config.
        classes: Names of the classes, by number.
    """
    facts = dict(
        task=net.task,
        input='uint8, RGB, (batch, height, width, 3)',
        canvas=net.canvas,
        resize=resizing_steps(cfg),
        classes=[*classes],
    )
    if 'masks' in net.output_names:
        facts['mask_threshold'] = net.model.test_cfg.rcnn.mask_thr_binary
    return json.dumps(facts)


def dataset_of_test(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the test data; empty if there is none."""
    return (cfg.get('test_dataloader') or {}).get('dataset') or {}


def resizing_steps(cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of the test pipeline that change an image's size, with their names as ``type``."""
    found = []
    for step in dataset_of_test(cfg).get('pipeline') or ():
        kind = step['type']
        name = (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]
        if name in RESIZES:
            found.append(dict(type=name, **{key: step[key] for key in KEPT if key in step}))
    return found
