"""Images and videos that a user names: finding, decoding and writing them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import mmcv
import numpy as np

from ..errors import UserError
from ..files import PARTIAL, write_whole

IMAGES = {'.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'}
VIDEOS = {'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.webm'}
WRITTEN_AS_THEY_ARE = {'.jpeg', '.jpg', '.png'}


class UnreadableError(Exception):
    """A file that is not an image or video, or that breaks off."""


@dataclass(frozen=True)
class Source:
    """An image or a video.

    Attributes:
        path: The file.
        name: What its results are called: its path in the folder that the user named.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by its suffix."""
        return self.path.suffix.lower() in VIDEOS

    @property
    def output(self) -> str:
        """Where its picture goes, in the folder of pictures."""
        if self.is_video:
            return str(Path(self.name).with_suffix('.mp4'))
        known = self.path.suffix.lower() in WRITTEN_AS_THEY_ARE
        return self.name if known else f'{self.name}.png'

    def frames(self) -> int:
        """Count the images: 1, or what a video's header says."""
        if not self.is_video:
            return 1
        return max(0, int(cv2.VideoCapture(str(self.path)).get(cv2.CAP_PROP_FRAME_COUNT)))

    def read(self) -> Iterator[np.ndarray]:
        """Decode the images one after another.

        Yields:
            np.ndarray: An image (H, W, 3) in BGR, turned as its EXIF says.

        Raises:
            UnreadableError: With the reason.
        """
        if self.is_video:
            yield from self._read_video()
            return
        try:
            image = mmcv.imread(str(self.path))
        except (OSError, cv2.error) as error:
            raise UnreadableError(getattr(error, 'strerror', None) or 'not an image') from error
        if image is None:
            raise UnreadableError('not an image that OpenCV can decode')
        yield image

    def _read_video(self) -> Iterator[np.ndarray]:
        if not self.path.is_file():
            raise UnreadableError('No such file or directory')
        video, count = cv2.VideoCapture(str(self.path)), 0
        while True:
            found, image = video.read()
            if not found:
                break
            count += 1
            yield image
        if count == 0:
            raise UnreadableError('not a video that OpenCV can decode')
        # The header of some formats is an estimate, so a frame or two prove nothing.
        if count < 0.9 * self.frames():
            raise UnreadableError(f'it breaks off after {count} of {self.frames()} frames')

    def frame_rate(self) -> float:
        """Frames per second of a video; 25 if it does not say."""
        return cv2.VideoCapture(str(self.path)).get(cv2.CAP_PROP_FPS) or 25.0


def find_sources(paths: Sequence[str], out: Path) -> list[Source]:
    """Find the images and videos that a user named.

    Args:
        paths: Files, and folders, which are searched with the folders in them.
        out: Where results go. What is in it is left out.

    Returns:
        list[Source]: In the order of the paths; the files of a folder by name. A named file that
        does not exist is among them.

    Raises:
        UserError: If there is nothing, or two results would have one name.
    """
    sources, out = [], out.resolve()
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(each for each in path.rglob('*') if each.is_file())
            sources += [
                Source(each, str(each.relative_to(path)))
                for each in files
                if each.suffix.lower() in IMAGES | VIDEOS
                if not each.resolve().is_relative_to(out)
            ]
        else:
            sources.append(Source(path, path.name))
    if not sources:
        raise UserError(
            f'{", ".join(paths)}: no images or videos there; what counts are files that end in '
            f'{" ".join(sorted(IMAGES | VIDEOS))}'
        )
    seen: dict[str, Source] = {}
    for source in sources:
        other = seen.setdefault(source.output, source)
        if other is not source:
            raise UserError(
                f'{other.path} and {source.path} would both be written to {source.output}; '
                'give them in two calls with different --out'
            )
    return sources


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write an image, whole or not at all.

    Args:
        path: The file; its suffix names the format.
        image: (H, W, 3) in BGR, or (H, W).
    """
    write_whole(path, cv2.imencode(path.suffix, image)[1].tobytes())


class Pictures:
    """A folder of pictures and videos, used as a context.

    A video has its name once it is whole.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._source: Source | None = None
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> 'Pictures':
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end_video(whole=kind is None)

    def write(self, source: Source, image: np.ndarray) -> None:
        """Write an image, or the next frame of a video; (H, W, 3) in BGR.

        Raises:
            UserError: If it cannot be written.
        """
        if source is not self._source:
            self._end_video()
        if not source.is_video:
            write_picture(self.folder / source.output, image)
            return
        if self._writer is None:
            self._source = source
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            code, size = cv2.VideoWriter_fourcc(*'mp4v'), image.shape[1::-1]
            self._writer = cv2.VideoWriter(str(self._partial), code, source.frame_rate(), size)
            if not self._writer.isOpened():
                raise UserError(
                    f'{self.folder / source.output} cannot be written: OpenCV cannot open the file '
                    'or lacks the codec mp4v. Choose another --out'
                )
        self._writer.write(image)

    @property
    def _partial(self) -> Path:
        path = self.folder / self._source.output
        return path.with_name(f'.{path.stem}{PARTIAL}.mp4')

    def _end_video(self, whole: bool = True) -> None:
        if self._writer is not None:
            self._writer.release()
            if whole:
                os.replace(self._partial, self.folder / self._source.output)
            else:
                self._partial.unlink(missing_ok=True)
        self._source = self._writer = None
