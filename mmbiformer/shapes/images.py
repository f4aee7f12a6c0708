"""Image files, encoded in memory."""

from pathlib import Path

import cv2
import numpy as np

JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95)


def encode_image(path: Path, image: np.ndarray) -> bytes:
    """The content of an image file.

    Args:
        path: Its suffix says the format.
        image: RGB ``(H, W, 3)`` or one channel ``(H, W)``, uint8.
    """
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(path.suffix, image, JPEG if path.suffix == '.jpg' else ())[1].tobytes()


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image, see :func:`encode_image`."""
    # OpenCV's imwrite reports success for an empty PNG file on a full disk.
    path.write_bytes(encode_image(path, image))
