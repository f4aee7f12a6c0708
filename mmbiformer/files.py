"""Files that are written whole or not at all."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from .errors import WriteError

PARTIAL = '.mmbiformer.partial'
"""The suffix of a file that is still being written."""


def write_whole(path: str | Path, content: bytes, advice: str = '') -> None:
    """Write a file under another name first, then rename it.

    Args:
        path: The file. Missing folders are made.
        content: All that the file holds.
        advice: What the user should do if it cannot be written. Defaults to ``''``: make room, or
            choose another place.

    Raises:
        WriteError: If the file cannot be written. The file that was there before stays.
    """
    path = Path(path)
    # The name is the same each time, so that the next attempt replaces what a killed one left.
    partial_path = path.with_name(f'.{path.name}{PARTIAL}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path.unlink(missing_ok=True)  # writing through a link would replace its target
        with open(partial_path, 'xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the new name
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
        path: The file; its suffix names the format.
        figure: The figure.
        dpi: Pixels per inch.

    Raises:
        WriteError: If the file cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format=Path(path).suffix[1:])
    write_whole(path, content.getvalue())
