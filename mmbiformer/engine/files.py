"""Files that are written whole or not at all."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from ..safe_load import CheckpointError

PARTIAL = '.mmbiformer.partial'
"""How names of files end that are not whole yet; no user's do."""


class WriteError(CheckpointError):
    """A file could not be written; the message says which, why and what to do."""


def write_whole(path: str | Path, content: bytes, advice: str = '') -> None:
    """Write a file whole or not at all: under another name first.

    Args:
        path: Where to. Folders that are missing are made.
        content: All of it, so that only the disk can fail.
        advice: What to tell the user where it cannot be written.

    Raises:
        WriteError: If it cannot be written. Nothing is left of it then.
    """
    path = Path(path)
    # The same name each time: what a killed process left is replaced.
    partial_path = path.with_name(f'.{path.name}{PARTIAL}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a folder from someone else it may be a link, at whose end a user's file would be lost.
        partial_path.unlink(missing_ok=True)
        with open(partial_path, 'xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: a power cut must not swap them
        os.replace(partial_path, path)
    except BaseException as error:  # an interrupt too
        with contextlib.suppress(OSError):
            partial_path.unlink()
        if not isinstance(error, OSError):
            raise
        raise WriteError(
            f'{path} cannot be written ({len(content) / 1e6:.0f} MB): {error.strerror or error}. '
            + (advice or 'Make room, or choose another place')
        ) from error


def write_figure(path: str | Path, figure: Any, dpi: int) -> None:
    """Write a figure of matplotlib as :func:`write_whole` does.

    Args:
        path: Where to; its suffix tells the format.
        figure: The figure.
        dpi: Pixels per inch.

    Raises:
        WriteError: If it cannot be written. Nothing is left of it then.
    """
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format=Path(path).suffix[1:])
    write_whole(path, content.getvalue())
