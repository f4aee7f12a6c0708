"""ImageNet-C's corruptions, made while images are loaded."""

import zlib
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform

from ..errors import UserError
from ..registry import TRANSFORMS

OWN_SEED = 'impulse_noise', 'glass_blur'
"""Corruptions that take a seed of their own instead of NumPy's
(findings/imagecorruptions-own-seeds.sh)."""


@TRANSFORMS.register_module()
class Corrupt(BaseTransform):
    """Corrupt an image as ImageNet-C does, by the package imagecorruptions.

    What an image gets depends on its path, the corruption, the severity and the seed alone, not on
    the order of the images nor on processes. It needs ``imagecorruptions-imaug``, which MMDetection
    brings: the older ``imagecorruptions`` cannot be imported beside a new setuptools.

    Args:
        corruption: Name, such as ``'gaussian_noise'``; see
            :data:`mmbiformer.evaluation.robustness.CORRUPTIONS`.
        severity: From 1 to 5.
        seed: Defaults to 0.

    Raises:
        UserError: If the package is not there or does not know the corruption or the severity. In
            ``transform``: if the image has less than 32 pixels a side.
    """

    def __init__(self, corruption: str, severity: int, seed: int = 0) -> None:
        try:
            from imagecorruptions import corrupt, get_corruption_names
        except ImportError as error:
            raise UserError(
                f'corruptions need the package imagecorruptions ({error}): '
                'pip install imagecorruptions-imaug'
            ) from error
        known = get_corruption_names('all')
        if corruption not in known or severity not in range(1, 6):
            raise UserError(
                f'corruption={corruption!r}, severity={severity!r}: known are '
                f'{", ".join(known)} of severity 1 to 5'
            )
        self.corrupt = corrupt
        self.corruption = corruption
        self.severity = severity
        self.seed = seed

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Corrupt ``img``, (H, W, 3) of uint8, BGR."""
        img, path = results['img'], str(results.get('img_path', ''))
        if min(img.shape[:2]) < 32:
            raise UserError(f'{path} has {img.shape[:2]} pixels; corruptions need 32 a side')
        # The end of a path, so that data sets may be moved.
        text = f'{self.seed} {self.corruption} {self.severity} {"/".join(path.split("/")[-2:])}'
        seed = zlib.crc32(text.encode())
        options = dict(seed=seed) if self.corruption in OWN_SEED else {}
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            rgb = np.ascontiguousarray(img[..., ::-1])
            corrupted = self.corrupt(rgb, self.severity, self.corruption, **options)
        finally:
            np.random.set_state(state)
        return {**results, 'img': np.ascontiguousarray(corrupted[..., ::-1])}
