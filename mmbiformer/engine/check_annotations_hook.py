"""Look at every annotation as it is loaded, and name the file that is broken."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from ..registry import HOOKS
from .check_pairs import check_pairs, tell_left_out
from .checks import data_paths

ORIENTATION = 0x0112
"""The tag of EXIF data."""


class AnnotationError(ValueError):
    """An annotation that cannot be trained on; the message begins with its file."""


@HOOKS.register_module()
class CheckAnnotationsHook(Hook):
    """End a run at a broken annotation, with the name of its file.

    What a ``LoadAnnotations`` of MMDetection or MMSegmentation fails at gets the file's name. Found
    as well is what they load as it is: masks that are no map of labels or of another size than
    their image, labels above the classes or 255, boxes that are not finite or were drawn in an
    image of another size. A warning names an image of which MMDetection drops every box or that is
    turned by EXIF data which leave its size, and a mask in which all is ignored. Before it starts,
    the images and masks that data sets name are sought, see :func:`check_pairs`, and images that
    MMPretrain leaves out. The commands in ``tools/`` set this hook by themselves.

    Raises:
        AnnotationError: By the data loader.
        MissingFileError: Before training or testing.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Look at the training data, and for missing files of the validation data too."""
        _check_pairs(runner, 'train')
        if runner.val_loop is not None:
            _check_pairs(runner, 'val')
        _check(runner.train_dataloader.dataset, runner.model)

    def before_val(self, runner: Runner) -> None:
        """Look at the validation data."""
        _check(runner.val_dataloader.dataset, runner.model)

    def before_test(self, runner: Runner) -> None:
        """Look at the test data."""
        _check_pairs(runner, 'test')
        _check(runner.test_dataloader.dataset, runner.model)


class CheckedAnnotations:
    """A transform that loads annotations, and looks at what it gives.

    Args:
        load: A ``LoadAnnotations`` of a host library.
        classes (int): Number of classes of the data.
        ignored (set[int]): Labels above the classes that are allowed.
        no_empty (bool): Whether images without annotations have been left out.
    """

    def __init__(self, load: Any, classes: int, ignored: set[int], no_empty: bool) -> None:
        self.load, self.classes, self.ignored, self.no_empty = load, classes, ignored, no_empty

    def __call__(self, results: dict) -> dict:
        """Load; the argument and the result are those of ``LoadAnnotations``."""
        image = results.get('img_path', 'an image')
        path = results.get('seg_map_path') or image
        size, own = results.get('ori_shape'), (results.get('height'), results.get('width'))
        if None not in (size, *own) and tuple(size[:2]) != own:
            raise AnnotationError(
                f'{image}: its annotation says {own[0]}x{own[1]} pixels, height and width, but it '
                f'has {size[0]}x{size[1]} (turned by its EXIF data?)'
            )
        if size is not None and (orientation := _orientation(image, size[0] == size[1])):
            warnings.warn(
                f'{image}: its EXIF data turn or mirror it (orientation {orientation}) and leave '
                'its size as it is, so that nothing tells whether it was annotated as it is stored '
                'or as it is shown and, unless color_type says otherwise, loaded. Look at it with '
                'browse_dataset.py, or save it upright without EXIF data',
                stacklevel=2,
            )
        try:
            results = self.load(results)
        except Exception as error:
            reason = f'{type(error).__name__}: {error}'
            if isinstance(error, KeyError):
                reason = f'its annotation has no {error}'
            raise AnnotationError(f'{path}: {reason}') from error
        if not isinstance(results, dict):  # None lets MMEngine take another image
            return results
        if self.no_empty and results.get('instances') == []:
            warnings.warn(
                f'{image}: none of its boxes can be used (without area, outside of the image, or '
                'not finite); it is trained on as background',
                stacklevel=2,
            )
        boxes = results.get('gt_bboxes')
        if boxes is not None:
            found = np.asarray(getattr(boxes, 'tensor', boxes))
            if not np.isfinite(found).all():
                row = found[~np.isfinite(found).all(-1)][0].tolist()
                raise AnnotationError(f'{image}: the box {row} (x1, y1, x2, y2) is not finite')
        if 'reduce_zero_label' in results and results.get('gt_seg_map') is not None:
            self._check_labels(results, path)
        return results

    def _check_labels(self, results: dict, path: str) -> None:
        labels, size = results['gt_seg_map'], results.get('ori_shape')
        if labels.ndim != 2:
            raise AnnotationError(
                f'{path}: a mask of shape {labels.shape}, but one label a pixel (H, W) is needed; '
                'save it as a grey or palette image'
            )
        if size is not None and labels.shape != tuple(size[:2]):
            raise AnnotationError(
                f'{path}: a mask of {labels.shape[0]}x{labels.shape[1]} pixels for an image of '
                f'{size[0]}x{size[1]} ({results.get("img_path")})'
            )
        if mode := _wide_mode(path):
            raise AnnotationError(
                f'{path}: a mask of 16 bits a pixel or more (mode {mode}), of which MMSegmentation '
                'keeps 8; save labels up to 255 as 8 bits'
            )
        eight = labels.dtype == np.uint8  # of which counting is ten times as fast as sorting
        found = np.flatnonzero(np.bincount(labels.ravel())) if eight else np.unique(labels)
        given = {*found.tolist()} - self.ignored
        if not given:
            zero = (
                ', which 0 is too under reduce_zero_label' if results['reduce_zero_label'] else ''
            )
            warnings.warn(f'{path}: every pixel is to be ignored{zero}', stacklevel=3)
        elif self.classes > 1 and max(given) >= self.classes:
            raise AnnotationError(
                f'{path}: the label {max(given)}, but there are {self.classes} classes, 0 to '
                f'{self.classes - 1}, and {", ".join(map(str, sorted(self.ignored)))} for what is '
                'to be ignored'
            )

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.load})'


def _orientation(path: str, square: bool) -> int | None:
    """How EXIF data turn a local image if its size does not show it: 2 to 4, of squares to 8."""
    try:
        with Image.open(path) as image:  # of which only the head is read
            orientation = image.getexif().get(ORIENTATION)
    except Exception:  # not local, another library's, huge, or of broken EXIF data
        return None
    return orientation if orientation in range(2, 9 if square else 5) else None


def _wide_mode(path: str) -> str | None:
    """Pillow's name for the pixels of a local image if they have more than 8 bits a channel."""
    try:
        with Image.open(path) as image:  # of which only the head is read
            return image.mode if image.mode[0] in 'IF' else None
    except (OSError, Image.DecompressionBombError):  # not local, another library's, or huge
        return None


def _check_pairs(runner: Runner, split: str) -> None:
    # Validation and test data are mostly the same.
    others = ('val', 'test') if split == 'train' else ('train',)
    loader = getattr(runner, f'{split}_dataloader')
    check_pairs([*leaves(loader.dataset)], split, data_paths(runner.cfg, others))
    for dataset in leaves(loader.dataset):
        tell_left_out(dataset, split)


def _check(dataset: Any, model: nn.Module) -> None:
    indices = (getattr(module, 'ignore_index', None) for module in model.modules())
    ignored = {255, *(index for index in indices if type(index) is int)}
    for leaf in leaves(dataset):
        transforms = getattr(getattr(leaf, 'pipeline', None), 'transforms', ())
        classes = len((getattr(leaf, 'metainfo', None) or {}).get('classes') or ())
        own = {index for index in [getattr(leaf, 'ignore_index', 255)] if type(index) is int}
        empty_too = getattr(leaf, 'test_mode', False)
        filtered = (getattr(leaf, 'filter_cfg', None) or {}).get('filter_empty_gt')
        for i, transform in enumerate(transforms):
            name = type(transform).__name__
            if name.startswith('Load') and name.endswith('Annotations'):
                no_empty = bool(filtered) and not empty_too
                transforms[i] = CheckedAnnotations(transform, classes, ignored | own, no_empty)


def leaves(dataset: Any) -> Iterator[Any]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset.

    Args:
        dataset: A data set, built.
    """
    inner = getattr(dataset, 'datasets', None) or getattr(dataset, 'dataset', None)
    if inner is None:
        yield dataset
    else:
        for child in inner if isinstance(inner, (list, tuple)) else [inner]:
            yield from leaves(child)
