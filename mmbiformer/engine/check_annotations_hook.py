"""Look at every annotation as it is loaded, and name the file that is broken."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import HOOKS


class AnnotationError(ValueError):
    """An annotation that cannot be trained on; the message begins with its file."""


@HOOKS.register_module()
class CheckAnnotationsHook(Hook):
    """End a run at a broken annotation, with the name of its file.

    What a ``LoadAnnotations`` of MMDetection or MMSegmentation fails at gets the file's name. Found
    as well is what they load as it is: masks that are no map of labels or of another size than
    their image, labels above the classes, boxes that are not finite. A warning names an image of
    which MMDetection drops every box. The commands in ``tools/`` set this hook by themselves.

    Raises:
        AnnotationError: By the data loader.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Look at the training data."""
        _check(runner.train_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        """Look at the validation data."""
        _check(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Look at the test data."""
        _check(runner.test_dataloader.dataset)


class CheckedAnnotations:
    """A transform that loads annotations, and looks at what it gives.

    Args:
        load: A ``LoadAnnotations`` of a host library.
        classes (int): Number of classes of the data.
        no_empty (bool): Whether images without annotations have been left out.
    """

    def __init__(self, load: Any, classes: int, no_empty: bool) -> None:
        self.load, self.classes, self.no_empty = load, classes, no_empty

    def __call__(self, results: dict) -> dict:
        """Load; the argument and the result are those of ``LoadAnnotations``."""
        image = results.get('img_path', 'an image')
        path = results.get('seg_map_path') or image
        try:
            results = self.load(results)
        except Exception as error:
            reason = f'{type(error).__name__}: {error}'
            if isinstance(error, KeyError):
                reason = f'its annotation has no {error}'
            raise AnnotationError(f'{path}: {reason}') from error
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
        above = (labels >= self.classes) & (labels != 255)
        if self.classes and above.any():
            raise AnnotationError(
                f'{path}: the label {labels[above][0]}, but there are {self.classes} classes, '
                f'0 to {self.classes - 1}, and 255 for what is to be ignored'
            )

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.load})'


def _check(dataset: Any) -> None:
    for leaf in leaves(dataset):
        transforms = getattr(getattr(leaf, 'pipeline', None), 'transforms', ())
        classes = len((getattr(leaf, 'metainfo', None) or {}).get('classes') or ())
        no_empty = bool((getattr(leaf, 'filter_cfg', None) or {}).get('filter_empty_gt'))
        for i, transform in enumerate(transforms):
            name = type(transform).__name__
            if name.startswith('Load') and name.endswith('Annotations'):
                transforms[i] = CheckedAnnotations(transform, classes, no_empty)


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
