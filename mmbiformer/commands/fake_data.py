"""Random images with random ground truth, for commands that run a model without its data set."""

from typing import Any

import torch
from mmengine.config import Config

from ..errors import UserError


def fake_batch(cfg: Config, batch_size: int, size: tuple[int, int]) -> dict[str, list[Any]]:
    """Make a batch as the data loader of a config would give it.

    Args:
        cfg: The whole config; its ``default_scope`` says for which host the batch is.
        batch_size: Number of images.
        size: Height and width of the images in pixels.

    Returns:
        dict: ``inputs``, images of shape (3, H, W), uint8, and ``data_samples`` with ground truth;
        what the model's ``data_preprocessor`` takes.

    Raises:
        UserError: If the host is not known.
    """
    makers = dict(mmdet=_detection, mmseg=_segmentation, mmpretrain=_classification)
    if cfg.get('default_scope') not in makers:
        raise UserError(
            f'{cfg.filename} has default_scope={cfg.get("default_scope")!r}; random images can be '
            f'made for {", ".join(makers)}'
        )
    images = list(torch.randint(256, (batch_size, 3, *size), dtype=torch.uint8))
    samples = makers[cfg.default_scope](batch_size, size)
    for step in _pipeline(cfg):
        if step.get('type') == 'mmbiformer.CropLabelMap':
            stride = step.transform.scale // step.tokens
            _add_token_targets(samples, [-(-side // stride) for side in size])
    return dict(inputs=images, data_samples=samples)


def _pipeline(cfg: Config) -> list[Any]:
    dataset = (cfg.get('train_dataloader') or {}).get('dataset') or {}
    return dataset.get('pipeline') or []


# Hosts are imported late because a config needs only one of the three.


def _detection(batch_size: int, size: tuple[int, int]) -> list[Any]:
    """Make samples with eight objects of the first class; each mask fills its box."""
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    samples = []
    for _ in range(batch_size):
        corners = torch.rand(8, 2, 2).sort(1).values * torch.tensor([size[1], size[0]]) * 0.8
        boxes = corners.flatten(1).floor()
        boxes[:, 2:] += 0.15 * min(size)
        masks = np.zeros((len(boxes), *size), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        instances = InstanceData(
            bboxes=HorizontalBoxes(boxes),
            labels=torch.zeros(len(boxes), dtype=torch.int64),
            masks=BitmapMasks(masks, *size),
        )
        sample = DetDataSample(metainfo=_metainfo(size), gt_instances=instances)
        sample.ignored_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.zeros(0, 4)), labels=torch.zeros(0, dtype=torch.int64)
        )
        samples.append(sample)
    return samples


def _segmentation(batch_size: int, size: tuple[int, int]) -> list[Any]:
    """Make samples whose pixels are of the first two classes, at random."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    maps = torch.randint(2, (batch_size, 1, *size))
    return [SegDataSample(metainfo=_metainfo(size), gt_sem_seg=PixelData(data=one)) for one in maps]


def _classification(batch_size: int, size: tuple[int, int]) -> list[Any]:
    """Make samples of the first two classes in turn."""
    from mmpretrain.structures import DataSample

    return [DataSample(metainfo=_metainfo(size)).set_gt_label(i % 2) for i in range(batch_size)]


def _add_token_targets(samples: list[Any], tokens: list[int]) -> None:
    """Add token labels of the first two classes, at random, for a map of so many tokens."""
    import numpy as np

    from ..datasets.label_maps import TokenTarget

    for sample in samples:
        scores = np.random.rand(2, *tokens).astype(np.float32)
        target = TokenTarget(np.arange(2), scores.mean((1, 2)), scores)
        sample.set_field(target, 'token_target')


def _metainfo(size: tuple[int, int]) -> dict[str, Any]:
    return dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_path='', img_id=0)
