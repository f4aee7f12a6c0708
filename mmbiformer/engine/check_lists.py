"""Look into classification data: lists of images and labels."""

import sys
from typing import Any

import numpy as np


class LabelError(ValueError):
    """A list of images that cannot be trained on; the message begins with its file."""


def check_list(path: str) -> str | None:
    """Say what is wrong with MMPretrain's list of names and labels; None if nothing is.

    Args:
        path: A local text file.
    """
    with open(path, 'rb') as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode()
            except UnicodeDecodeError:
                return f'line {number} is no UTF-8; save the file as UTF-8'
            if line[0] == '\ufeff':  # it would belong to the first name
                return 'it begins with a byte order mark; save the file as UTF-8 without one'
            try:
                int(line.strip().rsplit(' ', 1)[1])
            except (IndexError, ValueError):
                return (
                    f'line {number} is {line.rstrip()!r:.80}, but must be a name, a blank and a '
                    'label, which is an int, as in "folder/image.jpg 3"'
                )
    return None


def check_labels(dataset: Any, classes: int, split: str) -> None:
    """Raise LabelError if a label of MMPretrain's data is none of the classes.

    Losses take some of such labels, -100 for one, and learn nothing; metrics count them as wrong.

    Args:
        dataset: A data set, built, without wrappers.
        classes: Their number.
        split: What the data are for, for the message.
    """
    host = sys.modules.get('mmpretrain.datasets')
    # What has no such file numbers its classes itself.
    if host is None or not isinstance(dataset, host.BaseDataset) or not dataset.ann_file:
        return
    for i in range(len(dataset)):
        item = dataset.get_data_info(i)
        label = item.get('gt_label')
        # Labels of other kinds are for several classes an image.
        if isinstance(label, (int, np.integer)) and not 0 <= label < classes:
            raise LabelError(
                f'{dataset.ann_file}: entry {i + 1} of {len(dataset)} of the {split} data, '
                f'{item.get("img_path")}, has the label {label}, but there are {classes} classes, '
                f'0 to {classes - 1}. Mend the label, or the number of classes of data and model'
            )
