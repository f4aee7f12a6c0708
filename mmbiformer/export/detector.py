"""MMDetection's detectors with their post-processing, in operators that a graph can hold.

The host's own post-processing asks the data for its way: whether there are boxes, which levels have
some. What is here gives the same boxes without asking.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from ..errors import UserError

Settings = Mapping[str, Any]


class Detector(nn.Module):
    """RetinaNet, Mask R-CNN and what is built like them, for one image.

    Args:
        model: A detector of MMDetection: a single-stage one with an anchor head, or a two-stage one
            with an RPN, a standard RoI head and, perhaps, a mask head.
        canvas: Height and width of the images, in pixels.

    Attributes:
        output_names (list[str]): ``boxes``, ``scores``, ``labels`` and, perhaps, ``masks``.

    Raises:
        UserError: If a part of the model is of a kind that is not known here.
    """

    def __init__(self, model: nn.Module, canvas: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.canvas = model, canvas
        self.output_names = ['boxes', 'scores', 'labels']
        roi_head = getattr(model, 'roi_head', None)
        dense = model.bbox_head if roi_head is None else model.rpn_head
        parts = [(dense, ('AnchorHead', 'RetinaHead', 'RetinaSepBNHead', 'RPNHead'))]
        parts += [(dense.bbox_coder, ('DeltaXYWHBBoxCoder',))]
        settings = [model.test_cfg if roi_head is None else model.test_cfg.rpn]
        if roi_head is not None:
            box_head = roi_head.bbox_head
            parts += [(roi_head, ('StandardRoIHead',)), (box_head.bbox_coder, parts[1][1])]
            parts += [(roi_head.bbox_roi_extractor, ('SingleRoIExtractor',))]
            settings.append(model.test_cfg.rcnn)
            if roi_head.with_mask:
                self.output_names.append('masks')
                parts += [(roi_head.mask_head, ('FCNMaskHead',))]
                parts += [(roi_head.mask_roi_extractor, ('SingleRoIExtractor',))]
        for part, kinds in parts:
            if type(part).__name__ not in kinds:
                raise UserError(
                    f'the post-processing of {type(part).__module__}.{type(part).__name__} is not '
                    f'known; take {" or ".join(kinds)}, or export the feature maps by --backbone'
                )
        for head in (dense, *([] if roi_head is None else [roi_head.bbox_head])):
            if not head.bbox_coder.clip_border:
                raise UserError('boxes beyond the border are not exported; set clip_border=True')
            if getattr(head.loss_cls, 'custom_cls_channels', False):
                raise UserError(
                    f'the scores of {type(head.loss_cls).__name__} are not exported; take '
                    'CrossEntropyLoss or FocalLoss, or export the feature maps by --backbone'
                )
        for each in settings:
            if each.nms.get('type', 'nms') != 'nms':
                raise UserError(
                    f'nms of type {each.nms.type!r} is not exported; take type="nms" in test_cfg'
                )

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            x: A normalized image on its canvas, (1, 3, H, W).
            height: Height of the image itself, in pixels.
            width: Width of the image itself.

        Returns:
            tuple[Tensor, ...]: N boxes (N, 4) as left, top, right, bottom in pixels, their scores
            (N,), falling, and labels (N,), and for a model with masks the probability of each pixel
            of a box, (N, h, w).
        """
        feats = self.model.extract_feat(x)
        border = torch.stack([torch.scalar_tensor(side) for side in (width, height) * 2])
        if not hasattr(self.model, 'roi_head'):
            return self._one_stage(feats, border)
        boxes = self._propose(feats, border)
        boxes, scores, labels = self._classify(feats, boxes, border)
        if 'masks' not in self.output_names:
            return boxes, scores, labels
        head = self.model.roi_head
        masks = head.mask_head(_align(head.mask_roi_extractor, feats, boxes))
        if not head.mask_head.class_agnostic:
            masks = masks[torch.arange(labels.shape[0]), labels][:, None]
        return boxes, scores, labels, masks[:, 0].sigmoid()

    def _one_stage(self, feats: tuple[Tensor, ...], border: Tensor) -> tuple[Tensor, ...]:
        head, cfg = self.model.bbox_head, self.model.test_cfg
        scores, labels, boxes = [], [], []
        for score, delta, anchors in self._levels(head, feats):
            top, index = _top(score.flatten(), cfg.get('nms_pre', -1))
            row = index // score.shape[1]
            scores.append(top)
            labels.append(index % score.shape[1])
            boxes.append(_decode(head.bbox_coder, anchors[row], delta[row], border))
        return self._final(*map(torch.cat, (boxes, scores, labels)), cfg)

    def _propose(self, feats: tuple[Tensor, ...], border: Tensor) -> Tensor:
        """The RPN's boxes, (P, 4)."""
        head, cfg = self.model.rpn_head, self.model.test_cfg.rpn
        scores, levels, boxes = [], [], []
        for i, (score, delta, anchors) in enumerate(self._levels(head, feats)):
            top, row = _top(score.flatten(), cfg.get('nms_pre', -1))
            scores.append(top)
            levels.append(torch.full_like(row, i))
            boxes.append(_decode(head.bbox_coder, anchors[row], delta[row], border))
        boxes, scores, levels = map(torch.cat, (boxes, scores, levels))
        boxes, scores, levels = _large(boxes, scores, levels, cfg)
        return boxes[self._nms(boxes, scores, levels, cfg)]

    def _classify(
        self, feats: tuple[Tensor, ...], boxes: Tensor, border: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The second stage's boxes, scores and labels."""
        head = self.model.roi_head
        logits, deltas = head.bbox_head(_align(head.bbox_roi_extractor, feats, boxes))
        scores = logits.softmax(-1)[:, :-1]
        classes = scores.shape[1]
        deltas = deltas.view(-1, 1 if head.bbox_head.reg_class_agnostic else classes, 4)
        boxes = _decode(head.bbox_head.bbox_coder, boxes[:, None], deltas, border)
        boxes = boxes.expand(-1, classes, 4).reshape(-1, 4)
        labels = torch.arange(classes).expand_as(scores).reshape(-1)
        return self._final(boxes, scores.reshape(-1), labels, self.model.test_cfg.rcnn)

    def _final(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, cfg: Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        likely = torch.nonzero(scores > cfg.get('score_thr', 0))[:, 0]
        boxes, scores, labels = boxes[likely], scores[likely], labels[likely]
        boxes, scores, labels = _large(boxes, scores, labels, cfg)
        kept = self._nms(boxes, scores, labels, cfg)
        return boxes[kept], scores[kept], labels[kept]

    def _levels(self, head: nn.Module, feats: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """For each level the scores (n, classes), deltas (n, 4) and anchors (n, 4)."""
        logits, deltas = head(feats)
        anchors = head.prior_generator.grid_priors([x.shape[2:] for x in logits], device='cpu')
        found = []
        for logit, delta, anchor in zip(logits, deltas, anchors, strict=True):
            logit = logit[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
            score = logit.sigmoid() if head.use_sigmoid_cls else logit.softmax(-1)[:, :-1]
            found.append((score, delta[0].permute(1, 2, 0).reshape(-1, 4), anchor))
        return found

    def _nms(self, boxes: Tensor, scores: Tensor, groups: Tensor, cfg: Settings) -> Tensor:
        """Numbers of the boxes that are left, best first; groups do not touch each other."""
        if not cfg.nms.get('class_agnostic', False):
            boxes = boxes + (groups * (max(self.canvas) + 1.0))[:, None]
        return nms(boxes, scores, cfg.nms.iou_threshold)[: cfg.max_per_img]


def _top(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The highest scores and their numbers; all of them for a number below 1."""
    return scores.topk(min(most, len(scores)) if most > 0 else len(scores))


def _large(boxes: Tensor, scores: Tensor, groups: Tensor, cfg: Settings) -> tuple[Tensor, ...]:
    """Leave out small boxes, if the settings say so."""
    least = cfg.get('min_bbox_size', -1)
    if least < 0:
        return boxes, scores, groups
    large = torch.nonzero(((boxes[:, 2:] - boxes[:, :2]) > least).all(1))[:, 0]
    return boxes[large], scores[large], groups[large]


def _decode(coder: Any, boxes: Tensor, deltas: Tensor, border: Tensor) -> Tensor:
    """Move and scale boxes (…, 4) by deltas (…, 4), within the border, as DeltaXYWHBBoxCoder."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    size = boxes[..., 2:] - boxes[..., :2]
    middle = 0.5 * (boxes[..., 2:] + boxes[..., :2])
    shift, most = size * deltas[..., :2], abs(math.log(16 / 1000))
    if coder.add_ctr_clamp:
        shift = shift.clamp(-coder.ctr_clamp, coder.ctr_clamp)
        scale = deltas[..., 2:].clamp(max=most)
    else:
        scale = deltas[..., 2:].clamp(-most, most)
    half = 0.5 * size * scale.exp()
    middle = middle + shift
    decoded = torch.cat([middle - half, middle + half], -1)
    return decoded.clamp(min=0).minimum(border)


def _align(extractor: nn.Module, feats: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """Cut each box out of the level of its size: (P, 4) to (P, C, h, w)."""
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    layers = extractor.roi_layers
    levels = extractor.map_roi_levels(rois, len(layers))
    numbers, found = [], []
    for i, layer in enumerate(layers):
        number = torch.nonzero(levels == i)[:, 0]
        numbers.append(number)
        found.append(
            roi_align(
                feats[i],
                rois[number],
                layer.output_size,
                layer.spatial_scale,
                layer.sampling_ratio,
                layer.aligned,
            )
        )
    number = torch.cat(numbers)
    place = torch.zeros_like(levels).scatter(0, number, torch.arange(number.shape[0]))
    return torch.cat(found)[place]
