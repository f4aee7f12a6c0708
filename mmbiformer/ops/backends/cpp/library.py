"""Compiles attention.cpp for this processor, once, and loads it."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name('attention.cpp')
# Tuned for any processor: for some, GCC would load again what it has in a register.
FLAGS = ['-O3', '-march=native', '-mtune=generic', '-ffp-contract=fast', '-std=c++17']
FLAGS += ['-fPIC', '-fopenmp']
LINK = ['-Wl,-z,defs']  # what it lacks is to be known at once
# GCC's, Intel's and LLVM's; wheels carry the first under a name with a hash.
OPENMP = re.compile(r'lib(gomp|iomp5|omp)(-[0-9a-f]+)?\.so')
SECONDS = 300  # to compile in; it takes about three


def load() -> ctypes.CDLL:
    """The library, compiled if it is not yet.

    Returns:
        ctypes.CDLL: The functions at the end of attention.cpp.

    Raises:
        RuntimeError: If there cannot be one here; the message says why, and what to do.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


@torch.compiler.assume_constant_result
def why_no_library() -> str | None:
    """Why there cannot be a library, or None; the first call may compile it."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if sys.platform != 'linux':
        return None, f'it is compiled on Linux only, and this is {platform.system()}'
    if not {'avx2', 'fma'} <= {*_features().split()}:
        return None, 'it is written for processors with AVX2 and FMA'
    try:
        library = _file()
        if library.exists():
            try:
                return ctypes.CDLL(str(library)), None
            except OSError as error:  # perhaps a machine with other libraries shares the folder
                logger.info('%s', error)
        _compile(library)
        return ctypes.CDLL(str(library)), None
    except OSError as error:
        return None, f'{error}; XDG_CACHE_HOME may name another folder to keep it in'
    except RuntimeError as error:
        return None, str(error)


def _file() -> Path:
    """Where the library is kept, by all that it depends on, in a folder that only the user writes.

    Raises:
        RuntimeError: If others can write there: they could have their own code run.
    """
    facts = SOURCE.read_text(encoding='utf-8'), ' '.join(FLAGS), _openmp(), _features()
    name = hashlib.sha256('\n'.join(facts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    folder = cache / 'mmbiformer' / 'cpp'
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(
            f'others can write in {folder}, and could have their own code run; let it be yours '
            'alone, or name another folder in XDG_CACHE_HOME'
        )
    return folder / f'attention-{name}.so'


def _compile(library: Path) -> None:
    compiler = os.environ.get('CXX') or shutil.which('g++') or shutil.which('c++')
    if not compiler:
        raise RuntimeError('there is no C++ compiler; install g++, or name one in CXX')
    logger.info('compiling %s for this processor, once', library)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = Path(folder, 'attention.o'), Path(folder, 'attention.so')
        _run([*compiler.split(), *FLAGS, '-c', str(SOURCE), '-o', str(compiled)])
        _run([*compiler.split(), '-shared', str(compiled), '-o', str(linked), _openmp(), *LINK])
        with linked.open('rb') as file:
            os.fsync(file.fileno())  # loading half of one would end the process
        linked.replace(library)  # whole or not at all, whoever else compiles it


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors='replace', timeout=SECONDS
        )
    except OSError as error:
        raise RuntimeError(
            f'the C++ compiler {command[0]} cannot be run ({error.strerror}); install g++, or name '
            'another in CXX'
        ) from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f'{" ".join(command)} took more than {SECONDS} s') from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ['']
        first = next((line for line in lines if 'error' in line), lines[0])
        raise RuntimeError(f'{" ".join(command)} failed: {first}; it takes GCC, which CXX may name')


def _openmp() -> str:
    """The OpenMP library that PyTorch runs its threads with: those of a second would be in the way.

    Raises:
        RuntimeError: If there is none.
    """
    maps = Path('/proc/self/maps').read_text(encoding='utf-8', errors='replace')
    files = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if '.so' in line}
    found = [file for file in files if OPENMP.match(Path(file).name)]
    if not found:
        raise RuntimeError('PyTorch runs its threads without an OpenMP library that GCC knows')
    packages = Path(torch.__file__).parents[1]
    own = str(packages / 'torch') + os.sep, str(packages / 'torch.libs') + os.sep
    return min(found, key=lambda file: (not file.startswith(own), file))  # others bring their own


def _features() -> str:
    """What the processor can do, in the kernel's words."""
    for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
        if line.lower().startswith(('flags', 'features')):
            return line
    return ''
