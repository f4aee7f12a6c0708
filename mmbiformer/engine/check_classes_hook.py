"""Compare the classes of the data with those of the annotation files and of the model."""

import json
import os
from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from ..registry import HOOKS
from .check_annotations_hook import leaves
from .check_coco import MAX_BYTES
from .check_lists import check_labels

OTHER_CLASSES = {'backbone', 'rpn_head', 'semantic_head'}
"""Parts of the hosts' models whose number of classes is not that of the data."""


class ClassCountError(ValueError):
    """Data and model have different numbers of classes; the message names both."""


@HOOKS.register_module()
class CheckClassesHook(Hook):
    """Stop a run before it starts if the data has more or fewer classes than the model's heads.

    With fewer the heads would be trained for classes that do not exist, or a class would be missing
    only where a label of it is met. So do a COCO annotation file that lacks one of the classes, or
    lists them in another order, as MMDetection would number them wrongly; and data whose classes
    are in another order than those of the training data, or of the checkpoint that is tested or
    resumed. Folders of classes are numbered by their names, whatever the classes are called: they
    must be the same in all data, and checkpoints keep their names. Labels of MMPretrain's data sets
    must be those of classes. The commands in ``tools/`` set this hook by themselves.
    Panoptic data sets, where each head has a part of the classes, are left alone.

    Raises:
        ClassCountError: Before training or testing, with both numbers.
        LabelError: Before training or testing.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.trained: Sequence[str] = ()
        self.folders: Sequence[str] = ()

    def before_train(self, runner: Runner) -> None:
        """Look at the training data and, if there are any, at the validation data."""
        _check(runner, 'train')
        _check_labels(runner, 'train')
        train = _classes(runner, 'train')
        _check_folders(runner, ('train',))
        if runner.val_loop is not None:
            _check(runner, 'val')
            _check_labels(runner, 'val')
            _check_order(_classes(runner, 'val'), train, 'the val data', 'the train data')
            _check_folders(runner, ('train', 'val'))
        if getattr(runner, '_resume', False):
            _check_order(train, self.trained, 'the train data', 'the checkpoint')
            _check_folders(runner, ('train',), self.folders)

    def before_val(self, runner: Runner) -> None:
        """Look at the validation data."""
        _check(runner, 'val')

    def before_test(self, runner: Runner) -> None:
        """Look at the test data."""
        _check(runner, 'test')
        _check_labels(runner, 'test')
        _check_order(_classes(runner, 'test'), self.trained, 'the test data', 'the checkpoint')
        _check_folders(runner, ('test',), self.folders)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the classes that the checkpoint was trained with, if it says so."""
        meta = checkpoint.get('meta')
        data = meta.get('dataset_meta') if isinstance(meta, dict) else None
        self.trained = _names(data.get('classes') if isinstance(data, dict) else None)
        self.folders = _names(meta.get('class_folders') if isinstance(meta, dict) else None)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the names of the folders of classes, which ``metainfo`` may replace by others."""
        if folders := _folders(runner, 'train'):
            checkpoint['meta']['class_folders'] = [*folders[0][1].values()]


def _names(value: Any) -> Sequence[str]:
    known = isinstance(value, (list, tuple)) and all(type(name) is str for name in value)
    return value if known else ()


def _folders(runner: Runner, split: str) -> list[tuple[str, dict[int, str]]]:
    """Of each data set that found folders of classes: where, and their names by number."""
    found = []
    for dataset in leaves(getattr(runner, f'{split}_dataloader').dataset):
        numbers = getattr(dataset, 'folder_to_idx', None)
        if isinstance(numbers, dict) and len({*numbers.values()}) == len(numbers):
            where = f'{getattr(dataset, "img_prefix", "a data set")} ({split} data)'
            found.append((where, {numbers[name]: name for name in sorted(numbers)}))
    return found


def _check_folders(runner: Runner, splits: Sequence[str], trained: Sequence[str] = ()) -> None:
    """Raise ClassCountError if one class has folders of different names."""
    found = [('the checkpoint', dict(enumerate(trained)))] if trained else []
    for split in splits:
        found += _folders(runner, split)
    for where, names in found[1:]:
        first, known = found[0]
        for i in sorted(names.keys() & known.keys()):
            if names[i] != known[i]:
                raise ClassCountError(
                    f'class {i} is the folder {names[i]} in {where}, but {known[i]} in {first}. '
                    'Folders of classes are numbered by their names: give them the same names in '
                    'all data, and remove what is no class'
                )


def _classes(runner: Runner, split: str) -> Sequence[str]:
    metainfo = getattr(getattr(runner, f'{split}_dataloader').dataset, 'metainfo', None) or {}
    return metainfo.get('classes') or ()


def _check(runner: Runner, split: str) -> None:
    loader = getattr(runner, f'{split}_dataloader')
    metainfo = getattr(loader.dataset, 'metainfo', None) or {}
    classes = metainfo.get('classes')
    first = None
    for dataset in leaves(loader.dataset):
        _check_categories(dataset, split)
        own = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
        first = first or own
        _check_order(own, first, f'one of the {split} data sets', 'another')
    if not classes or 'thing_classes' in metainfo:
        return
    other = {
        name: module.num_classes
        for name, module in runner.model.named_modules()
        if _is_of_classes(name, module) and module.num_classes != len(classes)
    }
    if other:
        settings = ', '.join(f'{name}.num_classes={count}' for name, count in other.items())
        raise ClassCountError(
            f'the {split} data have {len(classes)} classes ({_few(classes)}), but the model has '
            f'{settings}. Set num_classes of each to {len(classes)}, or name the classes of the '
            f'model in metainfo.classes of the {split} data set'
            + ''.join(
                f'. They are the folders in {leaf.img_prefix}: remove what is none'
                for leaf in leaves(loader.dataset)
                if hasattr(leaf, 'img_prefix') and not getattr(leaf, 'ann_file', None)
            )
        )


def _check_labels(runner: Runner, split: str) -> None:
    modules = runner.model.named_modules()
    heads = [module.num_classes for name, module in modules if _is_of_classes(name, module)]
    for dataset in leaves(getattr(runner, f'{split}_dataloader').dataset):
        classes = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
        if count := len(classes) or max(heads, default=0):
            check_labels(dataset, count, split)


def _check_categories(dataset: Any, split: str) -> None:
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
    found = getattr(dataset, 'cat_ids', None)
    path = str(getattr(dataset, 'ann_file', None))
    if found is None or not os.path.isfile(path):
        return
    if len(found) == len(classes) and os.path.getsize(path) > MAX_BYTES:
        return
    with open(path) as file:
        names = [category['name'] for category in json.load(file)['categories']]
    missing = [name for name in classes if name not in names]
    twice = [name for name in classes if names.count(name) > 1]
    if missing or twice:  # else the data set takes more than metainfo.classes on purpose
        raise ClassCountError(
            f'the {split} data have {len(classes)} classes, but {path} '
            + (
                f'lacks {_few(missing)}; its categories are {_few(names)}'
                if missing
                else f'has several categories of the name {_few(twice)}'
            )
            + '. Let metainfo.classes name the categories of the file as they are spelt there, or '
            'add what is missing to its categories'
        )
    ordered = [name for name in names if name in classes]
    if type(dataset).__name__ == 'CocoDataset' and ordered != [*dict.fromkeys(classes)]:
        pairs = zip(ordered, dict.fromkeys(classes), strict=True)
        given, needed = next(pair for pair in pairs if pair[0] != pair[1])
        raise ClassCountError(
            f'{path} lists its categories in another order than metainfo.classes of the {split} '
            f'data ({_few(classes)}): {given} comes where {needed} should. MMDetection '
            "numbers classes as the file lists them, so they would get each other's names. Sort "
            'the categories of the file (their ids may stay), or metainfo.classes of all data'
        )


def _check_order(classes: Any, others: Any, of: str, of_others: str) -> None:
    """Raise ClassCountError if a class that both have is not the same number in both."""
    classes, others = [*classes], [*others]
    places = {name: i for i, name in enumerate(others)}
    for i, name in enumerate(classes):
        # Two of ImageNet's are called crane.
        if places.get(name, i) != i and classes.count(name) == others.count(name) == 1:
            raise ClassCountError(
                f'{name} is class {i} of {of} ({_few(classes)}), but class {places[name]} of '
                f'{of_others} ({_few(others)}). Give both the same classes in the same order by '
                'metainfo.classes; folders of classes are numbered by their names'
            )


def _is_of_classes(name: str, module: nn.Module) -> bool:
    parts = {*name.split('.')}
    # A whole model (its name is empty, or that which wrappers give it) repeats a head's number.
    if parts <= {'', 'module'} or parts & OTHER_CLASSES:
        return False
    return type(getattr(module, 'num_classes', None)) is int


def _few(classes: Any) -> str:
    names = [str(name) for name in classes]
    return ', '.join(names if len(names) <= 10 else [*names[:3], '…'])
