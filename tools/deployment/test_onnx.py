"""Evaluate an exported file on the test data of a config, by the host's own metrics.

Example:
    python tools/deployment/test_onnx.py configs/maskrcnn_biformer_s_coco.py model.onnx
"""

import argparse
from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData, PixelData
from run_onnx import Model, nearest, paste
from torch import nn

from mmbiformer.commands.faults import run_command
from mmbiformer.commands.options import add_run_options, load_config
from mmbiformer.commands.preflight import check_data
from mmbiformer.commands.runner import build_runner


class OnnxModel(nn.Module):
    """An exported file in the place of a host's model: batches in, samples with predictions out.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.file = Model(path)

    def test_step(self, data: dict[str, Any]) -> list[Any]:
        """Predict.

        Args:
            data: As the data loader gives it: BGR images (3, H, W) that are resized already, and
                samples.

        Returns:
            list: The samples, with predictions.
        """
        samples = [*data['data_samples']]
        for image, sample in zip(data['inputs'], samples, strict=True):
            image = np.ascontiguousarray(image.flip(0).permute(1, 2, 0).numpy())
            self._add(sample, self.file.run(image))
        return samples

    def _add(self, sample: Any, found: dict[str, np.ndarray]) -> None:
        if 'logits' in found:
            scores = torch.from_numpy(found['logits']).softmax(0)
            sample.set_pred_score(scores).set_pred_label(scores.argmax())
            return
        height, width = sample.ori_shape[:2]
        if 'boxes' not in found:
            labels = torch.from_numpy(nearest(found['labels'], height, width))
            sample.pred_sem_seg = PixelData(data=labels[None])
            return
        boxes = found['boxes'] / np.float32([*sample.scale_factor] * 2)
        instances = InstanceData(
            bboxes=torch.from_numpy(boxes),
            scores=torch.from_numpy(found['scores']),
            labels=torch.from_numpy(found['labels']),
        )
        if 'masks' in found:
            threshold = self.file.facts['mask_threshold']
            masks = paste(found['masks'], boxes, height, width, threshold)
            instances.masks = torch.from_numpy(masks)
        sample.pred_instances = instances


def main() -> None:
    """Evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_options(parser)
    parser.add_argument('file', help='file of export_onnx.py')
    args = parser.parse_args()
    cfg = load_config(args)
    check_data(cfg, ('test',))
    cfg.load_from, cfg.resume = None, False
    runner = build_runner(cfg)
    runner.model = OnnxModel(args.file)
    runner.test()


if __name__ == '__main__':
    run_command(main)
