"""Whether data, model and checkpoint mean the same classes by the same numbers."""

import contextlib
import json
import mmap
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from ...errors import UserError
from ...registry import HOOKS

HEAD = re.compile(
    r'(^|\.)(bbox_head|mask_head|panoptic_head|decode_head|auxiliary_head|head)(\.\d+)?$'
)
"""Where the hosts have heads with one output a class."""
OTHER_PARTS = {'backbone', 'reid'}
"""Parts of the hosts' models whose classes are not those of the data."""
LANGUAGE = {'language_model', 'text_encoder', 'text_backbone', 'text_model'}
"""Parts of models that read the names of classes instead of numbers."""
LIBRARIES = {'mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg', 'mmbiformer', 'torchvision'}
"""Whose transforms leave the numbers of classes as they are."""
LONGEST_LIST = 2**24  # bytes of the categories of a COCO file


class ClassCountError(UserError, ValueError):
    """Data, model and checkpoint do not have the same classes; the message names both sides."""


@HOOKS.register_module()
class CheckClassesHook(Hook):
    """Stop a run before it starts if data, model and checkpoint number classes differently.

    No host finds these mistakes, and the run would learn or report the wrong classes:

    - The data have more or fewer classes than a head of the model, or than the one-hot labels of
      the data preprocessor.
    - Classes are in another order in two data sets, or in the checkpoint that is tested or resumed.
    - A COCO annotation file lacks a class, or lists its categories in another order than
      ``metainfo.classes``. MMDetection numbers classes as the file lists them.
    - Folders of classes, which are numbered by their sorted names, have other numbers in other
      data, or in the checkpoint.

    Left alone are panoptic data, models that read the names of classes, and heads with one output
    (or two for segmentation), which tell objects from background. Where a transform of the user's
    own may map the labels, other numbers of classes are a warning. The commands in ``tools/`` add
    this hook.

    Raises:
        ClassCountError: Before training or testing.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.trained: list[tuple[str, Sequence[str]]] = []

    def before_train(self, runner: Runner) -> None:
        """Look at the training data and, if there are any, at the validation data."""
        splits = ['train'] if runner.val_loop is None else ['train', 'val']
        _check(runner, splits, self.trained if runner._resume else [])

    def before_test(self, runner: Runner) -> None:
        """Look at the test data."""
        _check(runner, ['test'], self.trained)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the classes that the checkpoint was trained with, if it names them."""
        meta = checkpoint.get('meta') or {}
        lists = [*_class_lists(meta.get('dataset_meta')), meta.get('class_folders')]
        self.trained = [('the checkpoint', names) for names in lists if names]

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the names of the folders of classes, which ``metainfo`` may replace."""
        for dataset in _leaves(runner.train_dataloader.dataset):
            if folders := _folders(dataset):
                checkpoint['meta']['class_folders'] = folders


def _check(runner: Runner, splits: list[str], known: list[tuple[str, Sequence[str]]]) -> None:
    parts = {part for name, _ in runner.model.named_modules() for part in name.split('.')}
    if parts & LANGUAGE:
        return
    known = [*known]
    for split in splits:
        counts, mapped = [], False
        for dataset in _leaves(getattr(runner, f'{split}_dataloader').dataset):
            where = f'the {split} data'
            if path := getattr(dataset, 'ann_file', '') or getattr(dataset, 'img_prefix', ''):
                where += f' ({path})'
            metainfo = getattr(dataset, 'metainfo', None) or {}
            if 'thing_classes' in metainfo:
                continue
            classes = metainfo.get('classes') or ()
            _check_categories(dataset, classes, where)
            for names in (classes, _folders(dataset)):
                _check_order(names, where, known)
                known.append((where, names))
            counts.append((len(classes), where, classes))
            mapped |= _has_own_transform(dataset)
        try:
            if counts:
                _check_count(runner.model, *max(counts, key=lambda each: each[0]))
        except ClassCountError as error:
            if not mapped:
                raise
            runner.logger.warning(f'Unless your transforms map the classes: {error}')


def _has_own_transform(dataset: Any) -> bool:
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    return any(type(each).__module__.partition('.')[0] not in LIBRARIES for each in transforms)


def _leaves(dataset: Any) -> Iterator[Any]:
    """Yield the data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = getattr(dataset, 'datasets', None) or getattr(dataset, 'dataset', None)
    inner = inner if isinstance(inner, (list, tuple)) else [inner]
    if not all(hasattr(each, 'metainfo') for each in inner):
        yield dataset
        return
    for each in inner:
        yield from _leaves(each)


def _class_lists(metainfo: Any) -> list[Sequence[str]]:
    """Give the names of classes; several data sets of MMDetection have a list of metainfo."""
    several = metainfo if isinstance(metainfo, (list, tuple)) else [metainfo]
    return [each['classes'] for each in several if isinstance(each, dict) and each.get('classes')]


def _folders(dataset: Any) -> list[str]:
    """Give the names of the folders of classes in the order of their numbers."""
    numbers = getattr(dataset, 'folder_to_idx', None) or {}
    return sorted(numbers, key=numbers.get)


def _check_order(
    names: Sequence[str], where: str, known: Sequence[tuple[str, Sequence[str]]]
) -> None:
    """Raise ClassCountError if a class has another number elsewhere."""
    names = [*names]
    for other_place, others in known:
        others = [*others]
        numbers = {name: i for i, name in enumerate(others)}
        for i, name in enumerate(names):
            # A name may occur twice, as two in ImageNet.
            if numbers.get(name, i) != i and names.count(name) == others.count(name) == 1:
                raise ClassCountError(
                    f'{name} is class {i} of {where} ({_few(names)}), but class {numbers[name]} of '
                    f'{other_place} ({_few(others)}). Give both the same classes in the same '
                    'order by metainfo.classes; folders of classes are numbered by their sorted '
                    'names, so remove folders that are not classes'
                )


def _check_count(model: nn.Module, count: int, where: str, classes: Sequence[str]) -> None:
    """Raise ClassCountError if a head is for another number of classes."""
    wrong = {
        name: found
        for name, found in _counts_of_model(model)
        if count and found not in (count, None)
    }
    if wrong:
        settings = ', '.join(f'{name}.num_classes={found}' for name, found in wrong.items())
        raise ClassCountError(
            f'{where} have {count} classes ({_few(classes)}), but the model has {settings}. Set '
            f'num_classes of each to {count}, or name the classes of the model in metainfo.classes '
            'of the data set'
        )


def _counts_of_model(model: nn.Module) -> Iterator[tuple[str, int | None]]:
    """Yield the parts of a model that have one output or one label a class, and how many."""
    for name, module in model.named_modules():
        if {*name.split('.')} & OTHER_PARTS:
            continue
        if name.split('.')[-1] == 'data_preprocessor' and getattr(module, 'to_onehot', False):
            yield name, getattr(module, 'num_classes', None)
        elif place := HEAD.search(name):
            found = getattr(module, 'num_classes', None)
            binary = 2 if place[2] in ('decode_head', 'auxiliary_head') else 1
            agnostic = getattr(module, 'class_agnostic', False)  # of mask heads
            if type(found) is int and found > binary and not agnostic:
                yield name, found


def _check_categories(dataset: Any, classes: Sequence[str], where: str) -> None:
    """Raise ClassCountError if MMDetection numbers the classes of a COCO file wrongly."""
    host = sys.modules.get('mmdet.datasets')
    if host is None or not isinstance(dataset, host.CocoDataset):
        return
    if type(dataset).load_data_list is not host.CocoDataset.load_data_list:
        return  # it has numbers of its own
    names = _categories(dataset.ann_file)
    missing = [name for name in classes if name not in names]
    # The last ones change no number.
    if names and missing and names != [*classes][: len(names)]:
        raise ClassCountError(
            f'{where} lack classes: {_few(missing)}. The categories of the file are {_few(names)}. '
            'Name them in metainfo.classes as they are spelt there, or add what is missing to the '
            'file'
        )
    ordered = [name for name in names if name in classes]
    for given, needed in zip(ordered, dict.fromkeys(classes), strict=False):
        if given != needed:
            raise ClassCountError(
                f'{where} list the category {given} where metainfo.classes ({_few(classes)}) has '
                f'{needed}. MMDetection numbers classes as the file lists them. Sort the '
                'categories of the file (their ids may stay), or metainfo.classes of all data'
            )


def _categories(path: str) -> list[str]:
    """Find the names of categories in a COCO file without parsing the rest of it.

    Returns:
        list[str]: The names in the file's order; none if they are not found.
    """
    if not os.path.isfile(path):
        return []
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        if found := re.search(rb'"categories"\s*:\s*(?=\[\s*\{)', text):
            part = text[found.end() : found.end() + LONGEST_LIST].decode(errors='replace')
            with contextlib.suppress(KeyError, TypeError, ValueError):
                return [each['name'] for each in json.JSONDecoder().raw_decode(part)[0]]
    return []


def _few(names: Sequence[Any]) -> str:
    names = [str(name) for name in names]
    return ', '.join(names if len(names) <= 10 else [*names[:3], '…'])
