"""Faults of data, disk and processes while training: one message each, see docs/faults.md.

Everything else keeps its traceback, which a bug report needs.
"""

import contextlib
import json
import os
import re
import traceback
from collections.abc import Iterator

from mmengine.config import Config

from .check_finite_hook import NotFiniteError
from .command_line import CommandError, data_paths

RESUME = 'Then go on from the last checkpoint with --resume.'


@contextlib.contextmanager
def faults_explained(cfg: Config) -> Iterator[None]:
    """Turn faults of data, disk and processes into a CommandError.

    Args:
        cfg: The whole config, for the names of the files.

    Raises:
        CommandError: In the place of a fault.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        message = _explain(error, cfg)
        if message is None:
            raise
        raise CommandError(message) from error


def _explain(error: Exception, cfg: Config) -> str | None:
    text = str(error)
    last_line = (text.strip().splitlines() or [''])[-1]
    files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    if isinstance(error, NotFiniteError):
        return text
    if type(error).__name__ == 'CheckpointWriteError':
        return text
    if match := re.match(r'DataLoader worker \(pid.*', text):
        return (
            f'a worker of the data loader died: {match[0]}. If it was killed, memory ran out: '
            f'lower num_workers or batch_size of the data loader. {RESUME}'
        )
    if re.match(r'Caught \w+ in DataLoader worker process', text) or _within(files, 'fetch.py'):
        if '!buf.empty()' in last_line:  # all that OpenCV says
            folders = [path for path in data_paths(cfg, ('train', 'val')) if os.path.isdir(path)]
            return (
                f'an image file is empty; `find {" ".join(folders) or "DATA"} -type f -empty` '
                f'names it. Mend it, or take it out of the annotation file. {RESUME}'
            )
        name = re.match(r'Caught (\w+)|', text)[1] or type(error).__name__
        return (
            f'an image or its annotation cannot be read: {name}: '
            f'{last_line.removeprefix(f"{name}: ")}. Mend it, or take it out of the annotation '
            f'file. {RESUME}'
        )
    if _within(files, 'base_dataset.py') or isinstance(error, json.JSONDecodeError):
        files = [path for path in data_paths(cfg, ('train', 'val')) if path.endswith('.json')]
        return (
            f'the annotations cannot be read: {type(error).__name__}: {last_line}. Look into '
            f'{" and ".join(files) or "the data set"}'
        )
    if re.search(r'[Cc]onnection (?:closed|reset) by peer|Connection refused|timed? ?out', text):
        return f'another process of this job ended: {last_line}. See its own message. {RESUME}'
    return None


def _within(files: set[str], name: str) -> bool:
    """Whether an error passed through a file of torch's data loader or MMEngine's data sets."""
    return any(re.search(rf'(?:/data/_utils|mmengine/dataset)/{name}$', file) for file in files)
