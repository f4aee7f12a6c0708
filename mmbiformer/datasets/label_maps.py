"""Label maps of token labeling: reading, moving and cropping them.

The format is that of LV-ViT's label data (https://arxiv.org/abs/2104.10858): a tensor (2, K, H, W)
of floating-point numbers saved with ``torch.save``. Plane 0 has the K highest scores (logits) of a
classifier at each of H x W places of the whole image, plane 1 the numbers of their classes.
"""

import io
import zipfile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from ..errors import UserError


class LabelMap(NamedTuple):
    """Scores of the classes that occur in a map; all other classes have 0 everywhere.

    Attributes:
        scores: (C, H, W), float32.
        classes: Numbers of these classes, (C,), int64, rising.
    """

    scores: Tensor
    classes: Tensor


class TokenTarget(NamedTuple):
    """Scores of a crop. NumPy arrays, as each tensor would take a file descriptor on its way.

    Attributes:
        classes: Numbers of the classes that occur, (C,), int64; all others have the score 0.
        pooled: Scores of the whole crop, (C,), float32.
        tokens: Scores of each token, (C, H, W), float32.
    """

    classes: np.ndarray
    pooled: np.ndarray
    tokens: np.ndarray


def parse_label_map(content: bytes, name: str) -> LabelMap:
    """Read the content of a file with torch's ``weights_only``, which runs no code from it.

    Args:
        content: The bytes of the file.
        name: What to call it in errors.

    Raises:
        UserError: If it is damaged or no label map.
    """
    try:
        if content.startswith(b'PK'):
            _compare_checksums(content)
        packed = torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
    except Exception as error:
        raise UserError(
            f'the label map {name} cannot be read ({type(error).__name__}): it is damaged or no '
            'file of torch.save with a tensor; copy or make it again'
        ) from error
    if (
        not isinstance(packed, Tensor)
        or packed.ndim != 4
        or len(packed) != 2
        or 0 in packed.shape
        or not packed.is_floating_point()
    ):
        found = f'{packed.dtype} {tuple(packed.shape)}' if isinstance(packed, Tensor) else packed
        raise UserError(
            f'the label map {name} is {str(found)[:80]}; needed is a floating-point tensor '
            '(2, K, H, W) of scores and class numbers'
        )
    scores, numbers = packed.float()
    if not scores.isfinite().all() or not ((numbers >= 0) & (numbers == numbers.round())).all():
        raise UserError(
            f'the label map {name} is damaged: it has scores that are not finite or class numbers '
            'that are not 0, 1, 2, …; copy or make it again'
        )
    return unpack(scores, numbers.long())


def _compare_checksums(content: bytes) -> None:
    """Raise BadZipFile if a checksum is wrong, which torch does not look at."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            info.CRC = info.CRC or None  # torch can be told to write 0
            archive.read(info)


def unpack(scores: Tensor, numbers: Tensor) -> LabelMap:
    """Scatter the best scores of each place over their classes.

    Args:
        scores: (K, H, W).
        numbers: Class numbers, (K, H, W), int64.
    """
    classes, index = numbers.unique(return_inverse=True)
    full = scores.new_zeros(len(classes), *scores.shape[1:])
    return LabelMap(full.scatter_(0, index, scores), classes)


def flip(labels: LabelMap, direction: str) -> LabelMap:
    """Flip as an image is flipped: ``'horizontal'``, ``'vertical'`` or ``'diagonal'`` (both)."""
    sides = dict(horizontal=[2], vertical=[1], diagonal=[1, 2])[direction]
    return labels._replace(scores=labels.scores.flip(sides))


def warp(labels: LabelMap, matrix: np.ndarray, height: int, width: int) -> LabelMap:
    """Move a map as ``cv2.warpAffine`` moves the image; what comes in from outside has score 0.

    Args:
        labels: The map of the image.
        matrix: From pixels of the image to pixels of the moved image, (2, 3).
        height: Height of the image in pixels.
        width: Its width.
    """
    # affine_grid wants the way back, between coordinates from -1 to 1 over the edges of the image.
    x, y = width / 2, height / 2
    to_pixels = np.array([[x, 0, x - 0.5], [0, y, y - 0.5], [0, 0, 1]])
    forward = np.vstack([matrix, [0, 0, 1]])
    back = np.linalg.inv(to_pixels) @ np.linalg.inv(forward) @ to_pixels
    theta = torch.from_numpy(back[None, :2]).to(labels.scores)
    scores = labels.scores[None]
    grid = F.affine_grid(theta, scores.shape, align_corners=False)
    return labels._replace(scores=F.grid_sample(scores, grid, align_corners=False)[0])


def crop(
    labels: LabelMap, box: tuple[float, float, float, float], size: tuple[int, int]
) -> TokenTarget:
    """Give the scores of a crop and of each of its tokens, by RoIAlign.

    Args:
        labels: The map of the image.
        box: Left, top, right and bottom of the crop in parts of the image's width and height.
        size: Tokens of the crop, vertically and horizontally.
    """
    height, width = labels.scores.shape[1:]
    place = labels.scores.new_tensor(box) * torch.tensor([width, height, width, height]) - 0.5
    scores, places = labels.scores[None], [place[None]]
    return TokenTarget(
        labels.classes.numpy(),
        roi_align(scores, places, 1)[0, :, 0, 0].numpy(),
        roi_align(scores, places, size)[0].numpy(),
    )
