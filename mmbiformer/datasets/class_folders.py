"""Folders of images whose names, not their order, are the classes; needs MMPretrain."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine import fileio
from mmpretrain.datasets import BaseDataset
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
from timm.data import ImageNetInfo

from ..errors import UserError
from ..registry import DATASETS

IMAGES = '.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif'


@DATASETS.register_module()
class ClassFolders(BaseDataset):
    """A test set with a folder a class, which may lack classes.

    A folder's name is the name of a class, its number (as in ImageNet-V2, where ``10`` is class 10)
    or its WordNet name (as in ImageNet-C, ``n01440764``). MMPretrain's own data sets number the
    folders in the order of their names: ``10`` would be class 2, and a folder that is not there
    would shift all after it.

    Args:
        data_root: The folder of the class folders. Images may be in folders of their own in these.
        classes: Names of the classes. Defaults to None: ImageNet's.
        **kwargs: Of MMPretrain's ``BaseDataset``, such as ``pipeline``.

    Raises:
        UserError: If a folder is of no class, or there are no images.
    """

    METAINFO = {'classes': IMAGENET_CATEGORIES}

    def __init__(self, data_root: str, classes: Sequence[str] | None = None, **kwargs: Any) -> None:
        kwargs.setdefault('test_mode', True)
        super().__init__(ann_file='', data_root=str(data_root), classes=classes, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Find all images; ``img_path`` and ``gt_label`` of each."""
        root, labels = str(self.data_root), numbers_by_name(self.metainfo['classes'])
        files = sorted(fileio.list_dir_or_file(root, list_dir=False, recursive=True))
        images = [path for path in files if path.lower().endswith(IMAGES)]
        found = []
        for path in images:
            folder = Path(path).parts[0]
            if folder not in labels:
                raise UserError(
                    f'{root}/{folder} is no class: needed is a folder named by a class, a number '
                    f'below {len(self.metainfo["classes"])} or a WordNet name of ImageNet; give '
                    'the folder in which the folders of the classes are'
                )
            path = fileio.join_path(root, path)
            found.append(dict(img_path=path, gt_label=labels[folder]))
        if not found:
            raise UserError(f'{root} has no images in folders of classes; correct data_root')
        return found


def numbers_by_name(classes: Sequence[str]) -> Mapping[str, int]:
    """Numbers of classes by the names that their folders may have."""
    names = {str(i): i for i in range(len(classes))}
    if tuple(classes) == tuple(IMAGENET_CATEGORIES):
        names |= {name: i for i, name in enumerate(ImageNetInfo().label_names())}
    return names | {name: i for i, name in enumerate(classes)}
