"""Test-time augmentation for segmentation."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine.model import BaseTTAModel
from mmengine.structures import PixelData
from torch import Tensor

from ..registry import MODELS

ROWS = 64  # of pixels, whose probabilities are computed at once


@MODELS.register_module()
class SegTTAModel(BaseTTAModel):
    """MMSegmentation's ``SegTTAModel``, in the memory of two views.

    The probabilities of the views are summed as they come; MMSegmentation's own keeps the logits of
    all views. ``tools/test.py --tta`` takes this class where a config names that one.

    Args:
        module: The segmentor, or its config.
        data_preprocessor: Its data preprocessor, if the config has none. Defaults to None.
    """

    def test_step(self, data: dict[str, Any] | Sequence[Any]) -> list[Any]:
        """Segment a batch of augmented images.

        Args:
            data: As the data loader gives it: of each entry a list of views, of each view a batch.

        Returns:
            list[SegDataSample]: Of each image the sample of its last view, with the class of each
            pixel over all views in ``pred_sem_seg``, (H, W).
        """
        count, totals, samples = 0, [], []
        for view in _views(data):
            for sample in samples:
                del sample.seg_logits
            samples = self.module.test_step(view)
            if not count:
                totals = [torch.zeros_like(each.seg_logits.data) for each in samples]
                truths = [each.get('gt_sem_seg') for each in samples]
                paths = [each.img_path for each in samples]
            self._add(totals, samples)
            count += 1
        for total, sample, truth, path in zip(totals, samples, truths, paths, strict=True):
            sample.set_data(dict(pred_sem_seg=PixelData(data=self._classes(total.div_(count)))))
            if truth is not None:
                sample.set_data(dict(gt_sem_seg=truth))
            sample.set_metainfo(dict(img_path=path))
        return samples

    def _add(self, totals: list[Tensor], samples: list[Any]) -> None:
        for total, sample in zip(totals, samples, strict=True):
            logits = sample.seg_logits.data.split(ROWS, dim=1)
            for part, logit in zip(total.split(ROWS, dim=1), logits, strict=True):
                part += logit.softmax(0) if self.module.out_channels > 1 else logit.sigmoid()

    def _classes(self, mean: Tensor) -> Tensor:
        if self.module.out_channels > 1:
            return mean.argmax(0)
        return (mean > self.module.decode_head.threshold).to(mean).squeeze(1)

    def merge_preds(self, data_samples_list: list[Any]) -> list[Any]:
        """Not called: :meth:`test_step` merges."""
        raise NotImplementedError


def _views(data: dict[str, Any] | Sequence[Any]) -> Iterator[Any]:
    if isinstance(data, dict):
        for view in zip(*data.values(), strict=True):
            yield dict(zip(data, view, strict=True))
    else:
        yield from map(list, zip(*data, strict=True))
