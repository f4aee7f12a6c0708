"""Look for files that are missing or left out: images and masks, images of classes."""

import functools
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.fileio import list_dir_or_file
from mmengine.logging import print_log

from .checks import escaped

HOSTS = 'mmcv', 'mmdet', 'mmpretrain', 'mmseg', 'mmbiformer'
IMAGES = (
    *('.avif', '.bmp', '.dib', '.gif', '.heic', '.heif', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg'),
    *('.jxl', '.pbm', '.pgm', '.png', '.pnm', '.ppm', '.tga', '.tif', '.tiff', '.webp'),
)
"""Suffixes of files that are surely images."""
ITEMS = '__len__', '__getitem__', 'prepare_data', 'get_data_info'


class MissingFileError(ValueError):
    """Images or masks that are not there; the message names one, and how many there are."""


def check_pairs(datasets: Iterable[Any], split: str, others: Iterable[str]) -> None:
    """Look for the files of the hosts' data sets.

    They would end at a missing file when it is its turn, and MMSegmentation does not notice images
    that it has masks of.

    Args:
        datasets: Data sets, built, without wrappers.
        split: What they are for, for the message.
        others: Folders that other data loaders of the config read.

    Raises:
        MissingFileError: If an image or a mask that will be loaded is not there.
    """
    mmseg = sys.modules.get('mmseg.datasets')
    # Remote folders would take long to list once more.
    datasets = [
        dataset
        for dataset in datasets
        if isinstance(dataset, BaseDataset)
        and not getattr(dataset, 'backend_args', None)
        # One that counts or finds its items by itself may have others than are listed.
        and all(getattr(type(dataset), name) is getattr(BaseDataset, name) for name in ITEMS)
    ]
    for dataset in datasets:
        # What is named nowhere was listed.
        for key in _loaded(dataset) if dataset.ann_file or _has_masks(dataset) else ():
            _check_there(dataset, key, split)
    datasets = [dataset for dataset in datasets if _has_masks(dataset)]
    folders = Counter(os.path.normpath(folder) for folder in others)
    folders.update(os.path.normpath(_folders(dataset)[1]) for dataset in datasets)
    for dataset in datasets:
        masks = _folders(dataset)[1]
        by_folder = not dataset.ann_file or os.path.isdir(dataset.ann_file)
        own = type(dataset).load_data_list is not mmseg.BaseSegDataset.load_data_list
        suffixes = dataset.img_suffix, dataset.seg_map_suffix
        named = all(type(suffix) is str and suffix for suffix in suffixes)
        if by_folder and not own and named and all(map(os.path.isdir, _folders(dataset))):
            _tell_left_out(dataset, split, shared=folders[os.path.normpath(masks)] > 1)


def tell_left_out(dataset: Any, split: str) -> None:
    """Warn of images in folders of classes that MMPretrain leaves out without a word.

    Args:
        dataset: A data set, built, without wrappers.
        split: What the data are for, for the message.
    """
    host = sys.modules.get('mmpretrain.datasets')
    if host is None or not isinstance(dataset, host.CustomDataset) or dataset.ann_file:
        return
    others, dangling = [], []
    # Remote folders are none here. Links to folders have been followed without end before, if any.
    for top, _, names in os.walk(dataset.img_prefix, followlinks=True):
        for name in names:
            path = os.path.join(top, name)
            if name[0] == '.':
                continue
            if os.path.islink(path) and not os.path.exists(path):
                dangling.append(path)
            elif name.lower().endswith(IMAGES) and not dataset.is_valid_file(name):
                others.append(path)
    if others:
        _warn(
            f'{len(others)} images of the {split} data are left out, such as {min(others)}: their '
            f'names do not end in one of extensions={sorted(dataset.extensions)} of the data set'
        )
    if dangling:
        _warn(
            f'{len(dangling)} links in the {split} data are left out, such as {min(dangling)}: '
            'they lead to no file'
        )


def _has_masks(dataset: Any) -> bool:
    mmseg = sys.modules.get('mmseg.datasets')
    return mmseg is not None and isinstance(dataset, mmseg.BaseSegDataset)


def _folders(dataset: Any) -> tuple[str, str]:
    folders = (dataset.data_prefix.get(key) for key in ('img_path', 'seg_map_path'))
    return tuple(folder if isinstance(folder, str) else '' for folder in folders)


def _loaded(dataset: Any) -> list[str]:
    """Which files the pipeline cannot do without: those of images, of masks."""
    found = []
    for transform in dataset.pipeline.transforms:
        host, name = type(transform).__module__.split('.')[0], type(transform).__name__
        elsewhere = ('backend_args', 'file_client_args')  # paths may mean others there
        if host not in HOSTS or any(getattr(transform, key, None) for key in elsewhere):
            break  # one of the user's own may change paths
        if (host, name) == ('mmcv', 'LoadImageFromFile') and not transform.ignore_empty:
            found.append('img_path')
        elif (host, name) == ('mmseg', 'LoadAnnotations'):
            found.append('seg_map_path')
    return found


def _check_there(dataset: Any, key: str, split: str) -> None:
    files = functools.cache(_files)
    missing = []
    for i in range(len(dataset)):
        item = dataset.get_data_info(i)  # of which there is no room for all
        path = item.get(key)
        if isinstance(path, str) and '://' not in path:
            folder, name = os.path.split(path)
            if name not in files(folder or '.') and not os.path.isfile(path):
                missing.append((path, item.get('img_path')))
    if not missing:
        return
    what = 'images' if key == 'img_path' else 'masks'
    some = ', '.join(path for path, _ in missing[:3])
    if what == 'masks':
        some = '{}, for the image {}'.format(*missing[0])
    text = (
        f'{len(missing)} of {len(dataset)} {what} of the {split} data are not there, or no files, '
        f'such as {some}. '
    )
    source = dataset.ann_file or 'the folder of images'
    if _has_masks(dataset):
        names = f'The lines of {source} are names without suffixes. ' * bool(dataset.ann_file)
        text += (
            f"{names}A mask has its image's name, with seg_map_suffix={dataset.seg_map_suffix!r} "
            f'in the place of img_suffix={dataset.img_suffix!r}: mend these settings or data_prefix'
        )
    else:
        text += 'Mend data_root or data_prefix of the data set'
    raise MissingFileError(f'{text}, add the files, or take the names out of {source}')


def _files(folder: str) -> set[str]:
    """What is surely a file: asking for each by itself takes long where a disk is remote."""
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}


def _tell_left_out(dataset: Any, split: str, shared: bool) -> None:
    """Warn of masks without an image that is read, unless other data sets may have the images."""
    images, masks = _folders(dataset)
    suffix, mask_suffix = dataset.img_suffix, dataset.seg_map_suffix
    files = [*list_dir_or_file(images, list_dir=False, recursive=True)]
    read = {file[: -len(suffix)] for file in files if file.endswith(suffix)}
    known = read | {os.path.join(images, name + suffix) for name in read}
    lonely: dict[str, str] = {}
    for top, _, names in os.walk(masks):  # which no loop of links keeps for ever
        for file in names:
            path = os.path.join(top, file)
            name = os.path.relpath(path, masks)[: -len(mask_suffix)]
            if file.endswith(mask_suffix) and file[0] != '.' and {name, path}.isdisjoint(known):
                lonely[name] = path
    own = {*lonely.values()}
    unread = {os.path.splitext(file)[0]: os.path.join(images, file) for file in files}
    renamed = [unread[name] for name in lonely if name in unread and unread[name] not in own]
    if renamed:
        _warn(
            f'{len(renamed)} images of the {split} data are left out, such as {min(renamed)}: '
            f'they have masks, but their names do not end in img_suffix={suffix!r}'
        )
    lost = [path for name, path in lonely.items() if name not in unread and not _of(name, read)]
    if lost and not shared:
        _warn(
            f'{len(lost)} masks of the {split} data are left out, such as {min(lost)}: {images} '
            f'has no images of their names with img_suffix={suffix!r}'
        )


def _of(name: str, read: set[str]) -> bool:
    """Whether a mask is one of several of an image, as ``a_colour.png`` beside ``a.png``."""
    return any(name[:i] in read for i, letter in enumerate(name) if letter in '_-. ')


def _warn(text: str) -> None:
    print_log(escaped(text), logger='current', level=logging.WARNING)
