"""Token labeling: transforms that load label maps and move them with their images."""

import os
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_random_params
from mmengine import fileio
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS

from ..errors import UserError
from ..registry import TRANSFORMS
from .label_maps import crop, flip, parse_label_map, warp

FLIP, RANDAUGMENT = 'RandomFlip', 'RandAugment'
CROPS = 'RandomResizedCrop', 'EfficientNetRandomCrop'


@TRANSFORMS.register_module()
class LoadLabelMap(BaseTransform):
    """Load the label map of an image: ``ROOT/CLASS/NAME.pt`` for ``…/CLASS/NAME.JPEG``.

    Adds ``label_map``. The format is explained in :mod:`mmbiformer.datasets.label_maps`;
    ``tools/make_token_labels.py`` writes it.

    Args:
        root: Folder of the label maps.
        backend_args: Where files are, as in :func:`mmengine.fileio.get`. Defaults to None: local.

    Raises:
        UserError: If an image has no label map, or a damaged one; the message names the map.
    """

    def __init__(self, root: str, backend_args: dict[str, Any] | None = None) -> None:
        self.root = root
        self.backend_args = backend_args

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load the map of the image at ``img_path``."""
        folder, name = os.path.split(results['img_path'])
        name = os.path.splitext(name)[0] + '.pt'
        path = fileio.join_path(
            self.root, os.path.basename(folder), name, backend_args=self.backend_args
        )
        try:
            content = fileio.get(path, backend_args=self.backend_args)
        except FileNotFoundError as error:
            raise UserError(
                f'the image {results["img_path"]} has no label map {path}; correct root in '
                'LoadLabelMap, or make the maps with tools/make_token_labels.py'
            ) from error
        return {**results, 'label_map': parse_label_map(content, path)}


class _OnImage(BaseTransform):
    """A transform of MMPretrain, and the label map moved as it moves the image."""

    known: tuple[str, ...] = ()

    def __init__(self, transform: dict[str, Any]) -> None:
        self.inner = MMENGINE_TRANSFORMS.build({'_scope_': 'mmpretrain', **transform})
        # A class of the user's own that stands on one of these moves images as it does.
        names = [kind.__name__ for kind in type(self.inner).__mro__]
        found = [name for name in names if name in self.known]
        if not found:
            raise UserError(
                f'{type(self).__name__} cannot move label maps by {names[0]}; it knows '
                f'{", ".join(self.known)}. A transform that moves nothing, such as a change of '
                'colours, stands by itself in the pipeline'
            )
        self.kind = found[0]


@TRANSFORMS.register_module()
class MoveLabelMap(_OnImage):
    """Flip the image, or apply RandAugment to it, and move ``label_map`` in the same way.

    RandAugment's rotations, shears and translations move the map by the same part of the image;
    what they bring in from outside has the score 0 for every class.

    Args:
        transform: The config of ``RandomFlip`` or ``RandAugment``.

    Raises:
        UserError: If it is another transform.
    """

    known = (FLIP, RANDAUGMENT)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Transform ``img`` and ``label_map``."""
        if self.kind == FLIP:
            results = self.inner(results)
            if results['flip']:
                results['label_map'] = flip(results['label_map'], results['flip_direction'])
            return results
        for i in self.inner.random_policy_indices():
            policy = self.inner.transforms[i]
            height, width = results['img'].shape[:2]
            # A policy that is chosen twice draws its numbers twice.
            with cache_random_params(policy):
                results = policy(results)
                matrix = _matrix(policy, height, width)
            if matrix is not None:
                results['label_map'] = warp(results['label_map'], matrix, height, width)
        return results


def _matrix(policy: BaseTransform, height: int, width: int) -> np.ndarray | None:
    """How a policy of RandAugment has moved pixels, (2, 3), or None if it has not.

    The policy's random numbers are cached: it is asked for those that it has used.
    """
    kind = type(policy).__name__
    if kind not in ('Rotate', 'Shear', 'Translate') or policy.random_disable():
        return None
    magnitude = policy.random_negative(None)
    if kind == 'Rotate':
        return _rotation(magnitude, policy.center, policy.scale, height, width)
    horizontal = policy.direction == 'horizontal'
    if kind == 'Shear':
        x, y = (magnitude, 0) if horizontal else (0, magnitude)
        return np.array([[1, x, 0], [y, 1, 0]])
    x, y = (magnitude * width, 0) if horizontal else (0, magnitude * height)
    return np.array([[1, 0, x], [0, 1, y]])


def _rotation(
    angle: float, center: tuple[float, float] | None, scale: float, height: int, width: int
) -> np.ndarray:
    """Clockwise, by degrees."""
    x, y = center or ((width - 1) / 2, (height - 1) / 2)
    cos, sin = scale * np.cos(np.deg2rad(angle)), scale * np.sin(np.deg2rad(angle))
    return np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


@TRANSFORMS.register_module()
class CropLabelMap(_OnImage):
    """Crop and resize the image, and make the targets of the crop out of ``label_map``.

    ``token_target``, a :class:`~mmbiformer.datasets.label_maps.TokenTarget`, takes the place of
    ``label_map``; ``PackInputs`` keeps it with ``algorithm_keys=('token_target',)``. What moves
    images comes before this transform.

    Args:
        transform: The config of ``RandomResizedCrop`` or ``EfficientNetRandomCrop``.
        tokens: Height and width of the backbone's last map, or one number for both: 7 for images of
            224x224 and a stride of 32.

    Raises:
        UserError: If it is another transform.
    """

    known = CROPS

    def __init__(self, transform: dict[str, Any], tokens: int | tuple[int, int]) -> None:
        super().__init__(transform)
        self.tokens = (tokens, tokens) if isinstance(tokens, int) else tuple(tokens)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Crop ``img`` and ``label_map``."""
        img = results['img']
        height, width = img.shape[:2]
        # MMCV's cache_random_params refuses this transform
        # (findings/mmcv-cache-random-params.sh).
        drawn = top, left, crop_height, crop_width = self.inner.rand_crop_params(img)
        self.inner.rand_crop_params = lambda img: drawn
        try:
            results = self.inner(results)
        finally:
            del self.inner.rand_crop_params
        box = (left, top, left + crop_width, top + crop_height)
        box = tuple(part / whole for part, whole in zip(box, (width, height) * 2, strict=True))
        results['token_target'] = crop(results.pop('label_map'), box, self.tokens)
        return results
