"""Predictions of any of the hosts' models: pictures of them, and files for other programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DATASETS

from ..errors import UserError
from ..files import write_whole
from .pictures import Source, write_picture

CLASSES_SHOWN = 5


class Predictor:
    """A model with its host's inferencer.

    Attributes:
        classes: Names of the classes in their order; empty if neither config nor checkpoint has
            them.
        records: What :meth:`write` writes, one for each image.

    Args:
        cfg: The whole config.
        checkpoint: The file of the weights.
        device: Such as ``'cuda:1'``.
        out: Where results go.
        threshold: Lowest score of an instance that is drawn.
    """

    def __init__(
        self, cfg: Config, checkpoint: str, device: str, out: Path, threshold: float
    ) -> None:
        self.out, self.threshold = out, threshold
        self.inferencer = self.build(cfg, checkpoint, device)
        meta = metainfo(cfg)
        if meta.get('classes'):
            # The hosts know the names of what is in the checkpoint. The authors' files have none,
            # for which MMSegmentation takes those of Cityscapes.
            self.rename(meta)
        self.classes = [*(self.names() or ())]
        self.records: list[dict[str, Any]] = []

    def predict(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Predict a batch of images of one size.

        Args:
            images: Arrays (H, W, 3) in BGR.

        Returns:
            list: A data sample of the host for each.
        """
        samples = []
        for batch in self.inferencer.preprocess([*images], batch_size=len(images)):
            # Two of the hosts give the images back as well.
            data = batch if isinstance(batch, dict) else batch[1]
            with torch.no_grad():
                samples += self.inferencer.forward(data)
        return samples

    def draw(self, image: np.ndarray, sample: Any) -> np.ndarray:
        """Draw a prediction into an image; both are (H, W, 3) in BGR."""
        rgb = np.ascontiguousarray(image[..., ::-1])
        (drawn,) = self.inferencer.visualize([rgb], [sample], return_vis=True, **self.options())
        return np.ascontiguousarray(drawn[..., ::-1])

    def record(self, source: Source, frame: int | None, image: np.ndarray, sample: Any) -> None:
        """Keep a prediction for :meth:`write`."""
        where = {'file_name': source.name, **({} if frame is None else {'frame': frame})}
        size = {'height': image.shape[0], 'width': image.shape[1]}
        self.records.append({**where, **size, **self.describe(where, sample)})

    def write(self) -> Path:
        """Write the records; give the file."""
        path = self.out / 'predictions.json'
        write_whole(path, json.dumps(self.content(), indent=1).encode())
        return path

    def names(self) -> Sequence[str] | None:
        """Names of the classes that the inferencer knows."""
        return self.inferencer.model.dataset_meta.get('classes')

    def rename(self, meta: dict[str, Any]) -> None:
        """Let the inferencer use the names, and colours, of the config."""
        known = {key: meta[key] for key in ('classes', 'palette') if meta.get(key) is not None}
        self.inferencer.model.dataset_meta.update(known)

    def options(self) -> dict[str, Any]:
        """Options of the inferencer's ``visualize``."""
        return {}

    def content(self) -> Any:
        """The content of the file of results."""
        return self.records

    def name(self, label: int) -> str:
        """Name a class, by its number if it has no name."""
        return self.classes[label] if label < len(self.classes) else str(label)


class Classifier(Predictor):
    """Classes of whole images, by MMPretrain."""

    @staticmethod
    def build(cfg: Config, checkpoint: str, device: str) -> Any:
        from mmpretrain.apis import ImageClassificationInferencer
        from mmpretrain.visualization import UniversalVisualizer

        inferencer = ImageClassificationInferencer(cfg, pretrained=checkpoint, device=device)
        inferencer.visualizer = UniversalVisualizer()
        return inferencer

    def names(self) -> Sequence[str] | None:
        return self.inferencer.classes

    def rename(self, meta: dict[str, Any]) -> None:
        self.inferencer.classes = meta['classes']

    def draw(self, image: np.ndarray, sample: Any) -> np.ndarray:
        """Write the class into an image; both are (H, W, 3) in BGR."""
        visualizer = self.inferencer.visualizer
        rgb = np.ascontiguousarray(image[..., ::-1])
        visualizer.visualize_cls(rgb, sample, classes=self.classes or None, draw_gt=False)
        return np.ascontiguousarray(visualizer.get_image()[..., ::-1])

    def describe(self, where: dict[str, Any], sample: Any) -> dict[str, Any]:
        scores, labels = sample.pred_score.topk(min(CLASSES_SHOWN, len(sample.pred_score)))
        return {
            'classes': [
                {'label': label, 'name': self.name(label), 'score': score}
                for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
            ]
        }


class Segmentor(Predictor):
    """Classes of pixels, by MMSegmentation."""

    @staticmethod
    def build(cfg: Config, checkpoint: str, device: str) -> Any:
        from mmseg.apis import MMSegInferencer

        return MMSegInferencer(cfg, checkpoint, device=device, show_progress=False)

    def describe(self, where: dict[str, Any], sample: Any) -> dict[str, Any]:
        labels = sample.pred_sem_seg.data[0].cpu().numpy()
        name = where['file_name'] + (f'.{where["frame"]:06d}' if 'frame' in where else '')
        path = Path('labels', f'{name}.png')
        write_picture(self.out / path, labels.astype(np.uint8 if labels.max() < 256 else np.uint16))
        found, pixels = np.unique(labels, return_counts=True)
        shares = (pixels / labels.size).tolist()
        return {
            'labels': str(path),
            'classes': [
                {'label': label, 'name': self.name(label), 'share': share}
                for label, share in zip(found.tolist(), shares, strict=True)
            ],
        }


class Detector(Predictor):
    """Boxes, and masks where the model gives them, by MMDetection."""

    @staticmethod
    def build(cfg: Config, checkpoint: str, device: str) -> Any:
        from mmdet.apis import DetInferencer

        return DetInferencer(cfg, checkpoint, device=device, show_progress=False)

    def options(self) -> dict[str, Any]:
        return {'pred_score_thr': self.threshold}

    def rename(self, meta: dict[str, Any]) -> None:
        super().rename(meta)
        self.inferencer.visualizer.dataset_meta = self.inferencer.model.dataset_meta

    def describe(self, where: dict[str, Any], sample: Any) -> dict[str, Any]:
        return {'instances': self.inferencer.pred2dict(sample)}

    def content(self) -> dict[str, list]:
        """Give a whole data set in COCO's format. Its categories count from 1."""
        images, annotations = [], []
        for number, record in enumerate(self.records, 1):
            found = record.pop('instances')
            images.append({'id': number, **record})
            masks = found.get('masks') or [None] * len(found['labels'])
            rows = found['labels'], found['scores'], found['bboxes'], masks
            for label, score, (left, top, right, bottom), mask in zip(*rows, strict=True):
                width, height = right - left, bottom - top
                one = {
                    'id': len(annotations) + 1,
                    'image_id': number,
                    'category_id': label + 1,
                    'bbox': [left, top, width, height],
                    'area': width * height,
                    'iscrowd': 0,
                    'score': score,
                }
                annotations.append(one if mask is None else {**one, 'segmentation': mask})
        categories = [{'id': i, 'name': name} for i, name in enumerate(self.classes, 1)]
        return {'images': images, 'categories': categories, 'annotations': annotations}


PREDICTORS = dict(mmpretrain=Classifier, mmseg=Segmentor, mmdet=Detector)


def build_predictor(
    cfg: Config, checkpoint: str, device: str | None, out: Path, threshold: float
) -> Predictor:
    """Build the model and load its weights.

    Args:
        cfg: The whole config.
        checkpoint: The file of the weights.
        device: Such as ``'cuda:1'``, or None for the best one that there is.
        out: Where results go.
        threshold: Lowest score of an instance that is drawn.

    Raises:
        UserError: If the config is not one of the three hosts'.
    """
    host = cfg.get('default_scope')
    if host not in PREDICTORS:
        raise UserError(
            f'{cfg.filename} has default_scope={host!r}; predictions need one of '
            f'{", ".join(PREDICTORS)}'
        )
    return PREDICTORS[host](cfg, checkpoint, device or get_device(), out, threshold)


def metainfo(cfg: Config) -> dict[str, Any]:
    """Ask the data set of a config's test for its classes and colours, without its data."""
    dataset = dict(cfg.test_dataloader.dataset)
    kind = dataset['type']
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(dataset.get('_scope_')) as registry:
            kind = registry.get(kind)
    if not hasattr(kind, 'METAINFO'):  # a wrapper of several data sets
        return {}
    return dict(DATASETS.build({**dataset, 'lazy_init': True}).metainfo)
