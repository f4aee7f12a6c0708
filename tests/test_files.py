"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest

from mmbiformer.errors import UserError
from mmbiformer.files import PARTIAL, WriteError, write_whole


def test_folders_are_made(tmp_path):
    write_whole(tmp_path / 'a' / 'b.txt', b'new')
    assert (tmp_path / 'a' / 'b.txt').read_bytes() == b'new'


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_what_was_there_stays(error, tmp_path, monkeypatch):
    path = tmp_path / 'file'
    write_whole(path, b'old')

    def fail(*_):
        assert (tmp_path / f'.file{PARTIAL}').stat().st_size == 3
        raise error

    monkeypatch.setattr(os, 'fsync', fail)
    expected = WriteError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as info:
        write_whole(path, b'new', 'Go away')
    if expected is WriteError:
        assert isinstance(info.value, UserError)
        assert (
            str(info.value) == f'{path} cannot be written (0 MB): No space left on device. Go away'
        )
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b'old'


def test_leftovers_and_links_are_replaced(tmp_path):
    """A link would lead to another file of the user's."""
    other = tmp_path / 'other'
    other.write_bytes(b'precious')
    partial = tmp_path / f'.file{PARTIAL}'
    for leave in (lambda: partial.write_bytes(b'half'), lambda: partial.symlink_to(other)):
        leave()
        write_whole(tmp_path / 'file', b'new')
        assert (tmp_path / 'file').read_bytes() == b'new'
    assert not Path(tmp_path / 'file').is_symlink()
    assert other.read_bytes() == b'precious'
