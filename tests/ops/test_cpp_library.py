"""The library of the fused C++ attention: compiled once, kept safely, and what is said if not."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from mmbiformer.ops.backends.cpp import library


@pytest.fixture
def loads(tmp_path, monkeypatch):
    """Loads the library as a new process would that has an empty cache and these variables."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))

    def load(**env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return library._load.__wrapped__()

    return load


def test_it_is_compiled_once(loads, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        found, reason = loads(CXX='')
    assert reason is None
    assert hasattr(found, 'backward')
    assert 'for this processor, once' in caplog.text
    (file,) = (tmp_path / 'mmbiformer' / 'cpp').iterdir()  # and nothing beside it
    assert loads(CXX='/no/compiler')[1] is None  # not needed any more
    file.unlink()  # this process has it in memory
    file.write_bytes(b'of another machine')
    assert loads(CXX='')[1] is None
    assert [*file.parent.iterdir()] == [file]
    file.parent.chmod(0o770)
    assert 'others can write in' in loads()[1]


def test_no_compiler(loads, tmp_path):
    def reason(**env):
        found, why = loads(**env)
        assert found is None
        return why

    assert 'the C++ compiler /no/compiler cannot be run (No such file' in reason(CXX='/no/compiler')
    why = reason(CXX=sys.executable)  # it knows none of the options
    assert sys.executable in why
    assert why.endswith('GCC is needed, CXX can name it')
    none = 'there is no C++ compiler; install g++, or name one in CXX'
    assert reason(CXX='', PATH=str(tmp_path)) == none
    (tmp_path / 'taken').touch()
    assert 'XDG_CACHE_HOME can' in reason(CXX='g++', XDG_CACHE_HOME=str(tmp_path / 'taken'))


@pytest.mark.parametrize(
    ('maps', 'mine'),
    [
        (['/a/torch/libx.so', '/b/torch-env/sklearn.libs/libgomp-a34b3233.so.1.0.0'], 1),
        (['/a/sk.libs/libgomp-a34b3233.so.1.0.0', '{packages}/torch/lib/libgomp.so.1'], 1),
        (['/a/libgomp.so.1', '{packages}/torch.libs/libgomp-947d5fa1.so.1.0.0'], 1),
        (['/a/libgomp-plugin-nvptx.so.1', '/b/lib/libomp.so'], 1),
        (['/a/libomptarget.so', '/b/lib/libiomp5.so'], 1),
        (['/a/libgomp-plugin-nvptx.so.1', '/b/libcomp.so'], None),
    ],
)
def test_openmp_is_pytorchs(maps, mine, monkeypatch):
    packages = Path(torch.__file__).parents[1]
    maps = [each.format(packages=packages) for each in maps]
    lines = '\n'.join(f'7f7d52ee9000-7f7d52eea000 r-xp 00000000 fe:00 77   {x}' for x in maps)
    monkeypatch.setattr(Path, 'read_text', lambda self, **kwargs: lines)
    if mine is None:
        with pytest.raises(RuntimeError, match='without an OpenMP library'):
            library._openmp()
    else:
        assert library._openmp() == maps[mine]
