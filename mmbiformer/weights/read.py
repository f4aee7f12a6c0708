"""Read checkpoints with torch's ``weights_only``: nothing that a file names is imported or called.

torch refuses a file that names a class which it does not know. Most checkpoints do: they name an
``argparse.Namespace``, an omegaconf or yacs config, or MMEngine's ``HistoryBuffer``. During a load
each such name is registered with torch. It stands for a class or function of this module, never for
what it is the name of. Needs torch >= 2.10, as earlier ones could be made to run code.
"""

import contextlib
import pickle
import pickletools
import re
import threading
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any

import numpy as np
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleLR
from torch import serialization

from ..errors import CheckpointError, escaped

_AGAIN = 'download or copy it again and compare its size'
_LOCK = threading.Lock()  # the names that torch allows are those of the whole process
# Files that are often taken for a checkpoint, by how they begin.
_OTHERS = {
    b'<': f'it is a web page; {_AGAIN}',
    b'version https://git-lfs': 'it is a Git LFS pointer; run git lfs pull',
}


class _AlsoDict(type):
    """Makes StandIn equal to dict, as torch sets items only where ``type(x) == dict`` holds."""

    def __eq__(cls, other: Any) -> bool:
        return cls is other or other is dict

    __hash__ = type.__hash__


class StandIn(metaclass=_AlsoDict):
    """An object that was not read. It takes any arguments, state and items, and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> 'StandIn':
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __reduce__(self) -> tuple:
        return StandIn, ()


class _Dtype(StandIn):
    """Stands for ``numpy.dtype``; ``code`` is None unless it is one of numbers or text."""

    __slots__ = ('code',)

    def __init__(self, code: Any = None, *args: Any) -> None:
        known = type(code) is str and re.fullmatch(r'[biufc]\d{1,2}|[SU]\d{1,6}', code)
        self.code = code if known else None

    def __setstate__(self, state: Any) -> None:
        if self.code and state[1] in ('<', '>'):
            self.code = state[1] + self.code


class _Array(np.ndarray):
    """A NumPy array. One of objects, records or dates is left empty."""

    def __new__(cls, *args: Any) -> '_Array':
        return super().__new__(cls, 0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if dtype.code:
            order = 'F' if fortran else 'C'
            array = np.ndarray(shape, dtype.code, bytes(content), order=order)
            super().__setstate__(array.__reduce__()[2])

    def __reduce_ex__(self, protocol: int) -> tuple:
        return np.asarray(self).__reduce_ex__(protocol)


class _HistoryBuffer(HistoryBuffer):
    """Becomes a HistoryBuffer when its state is set, which must be two rows of numbers."""

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        # Not MMEngine's own, which writes functions from the file into the class.
        values, counts = (np.array(state[name]) for name in ('_log_history', '_count_history'))
        limit = state['max_length']
        numbers = all(row.ndim == 1 and row.dtype.kind in 'biuf' for row in (values, counts))
        if not numbers or len(values) != len(counts) or type(limit) is not int:
            raise CheckpointError(f'its training log is damaged; {_AGAIN}')
        self.__class__ = HistoryBuffer
        self.__init__(values, counts, limit)


class _OneCycle(StandIn):
    """Stands for MMEngine's OneCycle schedulers, whose state names one of two functions."""

    __slots__ = ()


def _attribute(owner: Any, name: Any, *default: Any) -> Any:
    """Stands for ``getattr``, by which a pickle names a method."""
    if owner is _OneCycle and name in ('_annealing_cos', '_annealing_linear'):
        return getattr(OneCycleLR, name)
    return StandIn  # which may be called


def _scalar(dtype: Any, content: Any = None) -> Any:
    """Stands for the function that makes a NumPy number."""
    return np.ndarray((), dtype.code, bytes(content))[()] if dtype.code else StandIn()


_BY_NAME: dict[str, Callable] = {
    'builtins.bytes': lambda *args: b'',  # only empty ones are written as a call
    'builtins.getattr': _attribute,
    'collections.defaultdict': lambda *args: {},
    'mmengine.logging.history_buffer.HistoryBuffer': _HistoryBuffer,
    'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler': _OneCycle,
    'numpy.dtype': _Dtype,
    'numpy.ndarray': _Array,
    'numpy._core.multiarray._reconstruct': _Array,
    'numpy._core.multiarray.scalar': _scalar,
    'numpy.core.multiarray._reconstruct': _Array,  # NumPy 1
    'numpy.core.multiarray.scalar': _scalar,
}


def read_checkpoint(path: str | PathLike, map_location: Any = 'cpu', mmap: bool = False) -> Any:
    """Read a checkpoint of ``torch.save``, zipped or legacy, or of safetensors.

    Tensors, plain data, NumPy arrays of numbers and MMEngine's ``HistoryBuffer`` are read; a
    ``defaultdict`` becomes a dict. In the place of any other object is a :class:`StandIn`. The
    checksums of zipped files are compared; the other formats have none.

    Args:
        path: Path of the file.
        map_location: Where tensors go, as in :func:`torch.load`. A safetensors file knows names of
            devices only. Defaults to ``'cpu'``.
        mmap: Whether tensors of a zipped file are mapped into memory instead of read; then their
            checksums are not compared. Defaults to False.

    Returns:
        Any: What was saved; an OrderedDict of tensors for safetensors.

    Raises:
        CheckpointError: If the file is damaged, or cannot be read without running code.
        OSError: If it cannot be opened.
    """
    with open(path, 'rb') as file:
        head = file.read(512)
    try:
        if head[4:9] == b'\x00\x00\x00\x00{':  # the length of a header, and the header
            device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
            return OrderedDict(safetensors.torch.load_file(path, str(device)))
        for start, reason in _OTHERS.items():
            if head.lstrip().startswith(start):
                raise CheckpointError(reason)
        return _read_torch(path, head.startswith(b'PK'), map_location, mmap)
    except Exception as error:
        reason = str(error)
        if not isinstance(error, CheckpointError):
            detail = f'{type(error).__name__}: {reason}'.splitlines()[0][:200]
            reason = f'it is truncated, damaged or no checkpoint ({detail}); {_AGAIN}'
        raise CheckpointError(escaped(f'{path} cannot be read: {reason}')) from error


def _read_torch(path: str | PathLike, zipped: bool, map_location: Any, mmap: bool) -> Any:
    if zipped and not mmap:
        map_location = _checking(path, map_location)
    names: list[str] = []
    with _nothing_allowed():
        try:
            names += _names_in(path, zipped)
            serialization.add_safe_globals([(_BY_NAME.get(n, StandIn), n) for n in names])
            result = torch.load(path, map_location, weights_only=True, mmap=zipped and mmap)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                'it is damaged, or cannot be read without running code from it '
                f'(it names {", ".join(sorted(names)[:3]) or "nothing"}). Where you trust it, load '
                'it with torch.load and save its weights alone'
            ) from error
    if result is StandIn or isinstance(result, StandIn):
        raise CheckpointError(
            f'it holds a pickled object ({", ".join(sorted(names)[:3])}), not weights by name; '
            'save the state_dict() of the model'
        )
    return result


@contextlib.contextmanager
def _nothing_allowed() -> Iterator[None]:
    """Forget the names that the process has allowed, such as ``getattr``, for a while."""
    with _LOCK:
        allowed = serialization.get_safe_globals()
        serialization.clear_safe_globals()
        try:
            yield
        finally:
            serialization.clear_safe_globals()
            serialization.add_safe_globals(allowed)


def _names_in(path: str | PathLike, zipped: bool) -> set[str]:
    """Names of classes and functions in a file, apart from those that torch knows."""
    if zipped:
        return {*serialization.get_unsafe_globals_in_checkpoint(path)}
    names = set()
    with open(path, 'rb') as file:
        for _ in range(4):  # a magic number, a version, sizes of C types, the content
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == 'GLOBAL':
                    module, name = argument.split(' ', 1)
                    new = IMPORT_MAPPING.get(module, module), name  # in Python 3
                    names.add('.'.join(NAME_MAPPING.get((module, name), new)))
    return names


def _checking(path: str | PathLike, map_location: Any) -> Callable:
    """A map location that compares checksums, which torch does not, with those in a zip file."""
    sums = defaultdict(set)
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if not any(info.filename.endswith('/data.pkl') for info in infos):
            raise CheckpointError(
                'it is a zip file without data.pkl; unpack it and give the file in it'
            )
        for info in infos:
            info.CRC = info.CRC or None  # torch can be told to write 0
            if '/data/' in info.filename:
                sums[info.file_size].add(info.CRC)
            else:
                archive.read(info)

    def place(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        known = sums.get(storage.nbytes())
        if not known or not known & {None, zlib.crc32(content)}:
            raise CheckpointError(f'a tensor does not match its checksum; {_AGAIN}')
        if callable(map_location):
            placed = map_location(storage, location)
            if placed is not None:
                return placed
        elif isinstance(map_location, dict):
            location = map_location.get(location, location)
        elif map_location is not None:
            location = str(map_location)
        return serialization.default_restore_location(storage, location)

    return place
