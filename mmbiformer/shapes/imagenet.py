"""The data set as one folder of images a class, laid out like ImageNet."""

from collections.abc import Iterable
from pathlib import Path

from .images import write_image
from .scenes import Scene
from .spec import CLASSES

FOLDERS = ('train', 'val')


def write(split_scenes: Iterable[Scene], out: Path, split: str) -> None:
    """Write scenes of one shape each as one split of a classification data set.

    Images go to ``OUT/SPLIT/CLASS/000000.jpg`` and on, numbered through the split. MMPretrain
    numbers classes by the folders' names in alphabetical order and reads them with ::

        dict(type='CustomDataset', data_root=OUT, data_prefix='train', with_label=True)

    Args:
        split_scenes: Scenes of the split; an iterator will do.
        out: Folder of the data set.
        split: Name of the split.
    """
    for name in CLASSES:
        (out / split / name).mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(split_scenes):
        (instance,) = scene.instances
        write_image(out / split / CLASSES[instance.label] / f'{index:06d}.jpg', scene.image)


def is_whole(out: Path, split: str, count: int) -> bool:
    """Whether all files of a split are there."""
    return sum(summarise(out, split)[name] for name in CLASSES) == count


def summarise(out: Path, split: str) -> dict[str, float]:
    """Numbers that describe a split, by name."""
    counts = {name: len(list((out / split / name).glob('*.jpg'))) for name in CLASSES}
    return {'images': sum(counts.values()), **counts}
