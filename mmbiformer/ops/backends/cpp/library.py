"""Compiles the C++ code for this processor, once, and loads it."""

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

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob('*.cpp'))
# Tuned for any processor: for some, GCC would load values again that are in a register.
FLAGS = ['-O3', '-march=native', '-mtune=generic', '-ffp-contract=fast', '-std=c++17']
FLAGS += ['-fPIC', '-fopenmp']
LINK = ['-Wl,-z,defs']  # a missing symbol must show when linking, not when running
# GCC's, Intel's and LLVM's. Wheels carry GCC's under a name with a hash.
OPENMP = re.compile(r'lib(gomp|iomp5|omp)(-[0-9a-f]+)?\.so')
SECONDS = 300  # limit for compiling, which takes about three seconds


def load() -> ctypes.CDLL:
    """The library, compiled if it is not yet.

    Returns:
        ctypes.CDLL: The functions that are ``extern "C"``.

    Raises:
        RuntimeError: If it cannot be compiled here; the message says why, and what to do.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


@torch.compiler.assume_constant_result
def why_no_library() -> str | None:
    """Why the library cannot be compiled, or None; the first call may compile it."""
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
            except OSError as error:  # a machine with other libraries may share the folder
                logger.info('%s', error)
        _compile(library)
        return ctypes.CDLL(str(library)), None
    except OSError as error:
        return None, f'{error}; XDG_CACHE_HOME can name another folder to keep it in'
    except RuntimeError as error:
        return None, str(error)


def _file() -> Path:
    """The library's path, named by a hash of all that it depends on.

    Raises:
        RuntimeError: If others can write in the folder, because they could place code of theirs.
    """
    texts = [file.read_text(encoding='utf-8') for file in (*SOURCES, FOLDER / 'tiles.h')]
    facts = *texts, ' '.join(FLAGS), _openmp(), _features()
    name = hashlib.sha256('\n'.join(facts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    folder = cache / 'mmbiformer' / 'cpp'
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(
            f'others can write in {folder}, and so place code that would be run; take their '
            'permission away (chmod go-w), or name another folder in XDG_CACHE_HOME'
        )
    return folder / f'attention-{name}.so'


def _compile(library: Path) -> None:
    compiler = os.environ.get('CXX') or shutil.which('g++') or shutil.which('c++')
    if not compiler:
        raise RuntimeError('there is no C++ compiler; install g++, or name one in CXX')
    logger.info('compiling %s for this processor, once', library)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = [], Path(folder, 'attention.so')
        for source in SOURCES:
            compiled.append(str(Path(folder, source.stem + '.o')))
            _run([*compiler.split(), *FLAGS, '-c', str(source), '-o', compiled[-1]])
        _run([*compiler.split(), '-shared', *compiled, '-o', str(linked), _openmp(), *LINK])
        with linked.open('rb') as file:
            os.fsync(file.fileno())  # loading half a library would end the process
        linked.replace(library)  # an atomic write: another process may compile it too


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
        raise RuntimeError(f'{" ".join(command)} failed: {first}; GCC is needed, CXX can name it')


def _openmp() -> str:
    """The OpenMP library that PyTorch uses: threads of a second one would compete with its own.

    Raises:
        RuntimeError: If PyTorch uses none that GCC can link.
    """
    maps = Path('/proc/self/maps').read_text(encoding='utf-8', errors='replace')
    files = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if '.so' in line}
    found = [file for file in files if OPENMP.match(Path(file).name)]
    if not found:
        raise RuntimeError('PyTorch runs its threads without an OpenMP library that GCC can link')
    packages = Path(torch.__file__).parents[1]
    own = str(packages / 'torch') + os.sep, str(packages / 'torch.libs') + os.sep
    return min(found, key=lambda file: (not file.startswith(own), file))  # packages bring others


def _features() -> str:
    """The processor's features, as the kernel lists them."""
    for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
        if line.lower().startswith(('flags', 'features')):
            return line
    return ''
