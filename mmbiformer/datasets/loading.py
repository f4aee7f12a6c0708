"""Decoding images as the authors' code does."""

import io
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine import fileio
from PIL import Image

from ..registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadImageWithPillow(BaseTransform):
    """Decode an image as torchvision's and timm's ``ImageFolder`` do.

    The pixels are those of ``Image.open(path).convert('RGB')`` for every mode. An EXIF orientation
    is ignored and transparency is dropped; ``LoadImageFromFile`` of the hosts turns the image and
    paints a ground under grey with alpha.

    Adds ``img``, an array (H, W, 3) of uint8 in the hosts' order BGR, and ``img_shape`` and
    ``ori_shape``, (H, W) in pixels. An image that is loaded already, as by the hosts' inferencers,
    stays as it is.

    Args:
        backend_args: Where files are, as in :func:`mmengine.fileio.get`. Defaults to None: local.
    """

    def __init__(self, backend_args: dict[str, Any] | None = None) -> None:
        self.backend_args = backend_args

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load the image at ``img_path``."""
        if 'img' in results:
            return results
        content = fileio.get(results['img_path'], backend_args=self.backend_args)
        with Image.open(io.BytesIO(content)) as image:
            img = np.ascontiguousarray(np.asarray(image.convert('RGB'))[..., ::-1])
        return {**results, 'img': img, 'img_shape': img.shape[:2], 'ori_shape': img.shape[:2]}
