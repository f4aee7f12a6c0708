"""Read a torch checkpoint without running anything that is in it.

``torch.load(weights_only=False)`` runs whatever the pickle in a file asks for, and
``weights_only=True`` refuses files with an ``argparse.Namespace``, an omegaconf config or
MMEngine's ``HistoryBuffer`` beside the weights. This reader stands between the two: the pickle is
interpreted by an allow-list of opcodes, and *no class or function is ever looked up by the name
that the file gives*. A global becomes a :class:`Placeholder`; calling one either runs a function of
this module that is registered under that name and checks its arguments, or gives a placeholder.
The exceptions are torch's dtypes and two harmless functions of MMEngine, from fixed lists.
"""

import ctypes
import io
import math
import os
import pickle
import re
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

MAX_EXPANDED = 2**26  # bytes of a tensor that is larger than its storage
MAX_ALL_EXPANDED = 2**28  # bytes that all tensors of a file are larger than their storages
MAX_ODD_KEYS = 2**11  # numbers and the like in keys: what they cost grows with the square of this
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_HISTORY_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'
_ONE_CYCLE = 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'


class CheckpointError(ValueError):
    """A file is no checkpoint that can be read safely; the message says why and what to do."""


class Placeholder:
    """Stands for a class, a function or an object that is not read.

    Args:
        name (str): Dotted name, as the file gives it.
    """

    __slots__ = ('name',)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f'Placeholder({self.name!r})'


def _require(condition: Any, what: str) -> None:
    if not condition:
        raise CheckpointError(what)


def _name(value: Any) -> str:
    # Never format an object of the file: the repr of a crafted one takes forever.
    return value.name if type(value) is Placeholder else ''


# ---- What a global may be called for. Arguments come from the file: each function checks its own.


def _is_shape(*values: Any) -> bool:
    return all(
        isinstance(value, tuple)
        and len(value) <= 64
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
        for value in values
    )


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
    dtype: Any = None,
) -> torch.Tensor:
    """A view into a storage, which :meth:`_Unpickler.load_binpersid` gives as a flat tensor."""
    _require(isinstance(storage, torch.Tensor), 'a tensor without a storage')
    _require(not metadata, 'a conjugated or negated view, which is not supported')
    dtype = storage.dtype if dtype is None else dtype
    _require(isinstance(dtype, torch.dtype), 'a tensor without a dtype')
    _require(_is_shape((offset,), size, stride) and len(size) == len(stride), 'a bad tensor shape')
    data = storage.untyped_storage()
    # Tensor.set_ would grow a storage that is too small, by memory that nobody has initialised.
    steps = [(count - 1) * step for count, step in zip(size, stride, strict=True)]
    end = offset + (1 + sum(steps) if math.prod(size) else 0)
    _require(
        end * dtype.itemsize <= data.nbytes(),
        f'a tensor of shape {tuple(size)} that does not fit into its storage',
    )
    # One number, expanded, is as large as it likes: whoever copies it would run out of memory.
    _require(
        math.prod(size) * dtype.itemsize <= max(data.nbytes(), MAX_EXPANDED),
        f'a tensor of shape {tuple(size)} expanded from {data.nbytes()} bytes',
    )
    tensor = torch.empty(0, dtype=dtype, device=data.device).set_(data, offset, size, stride)
    return tensor.requires_grad_(requires_grad is True)


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    return _tensor(storage, offset, size, stride, requires_grad, hooks, metadata, dtype)


def _parameter(data: Any, requires_grad: Any, hooks: Any = None, state: Any = None) -> torch.Tensor:
    _require(isinstance(data, torch.Tensor), 'a parameter without a tensor')
    return torch.nn.Parameter(data, requires_grad is True)


def _subclassed_tensor(function: Any, kind: Any, args: Any, state: Any = None) -> torch.Tensor:
    """The plain tensor below a tensor subclass or below Python attributes of a tensor."""
    build = _TENSORS.get(_name(function))
    _require(build and type(args) is tuple, f'a tensor made by {_name(function)}')
    return build(*args)


def _is_plain_key(key: Any) -> bool:
    """Whether nobody can choose keys like this one to share a hash.

    Hashes of text are random in every process, those of placeholders and tensors are addresses. But
    any count of numbers can be found that are alike (those that differ by ``2**61 - 1``), and of
    tuples and sets (``-1`` and ``-2`` are alike). A dictionary compares each with all before it.
    """
    if type(key) is tuple:
        return all(type(item) is str for item in key)
    if type(key) is int:
        return abs(key) < 2**32
    # Not of a class derived from these: numpy's text, for one, is no text to Unpickler.spend.
    plain = (str, bytes, bool, type(None), Placeholder, torch.Tensor, torch.nn.Parameter)
    return type(key) in plain


# Those that make keys get Unpickler.key first, which checks one.


def _collection(kind: type) -> Callable:
    def build(check: Callable, items: Any = ()) -> Any:
        _require(type(items) in (list, tuple, set, frozenset), f'bad content of a {kind.__name__}')
        return kind(check(item) for item in items)

    return build


def _ordered_dict(check: Callable, pairs: Any = ()) -> OrderedDict:
    _require(type(pairs) in (list, tuple), 'bad content of an OrderedDict')
    return OrderedDict((check(key), value) for key, value in pairs)


def _counter(check: Callable, counts: Any = None) -> Counter:  # milestones of a MultiStep scheduler
    counts = {} if counts is None else counts
    _require(type(counts) is dict, 'bad content of a Counter')
    return Counter({check(key): count for key, count in counts.items()})


def _encode(text: Any, encoding: Any) -> bytes:
    _require(type(text) is str and encoding in ('latin1', 'latin-1'), 'bad encoded bytes')
    return text.encode('latin1')


def _bytes(data: Any = b'', encoding: Any = None) -> bytes:
    # An int would be a size to allocate.
    _require(type(data) in (bytes, bytearray, str), 'bad content of bytes')
    return _encode(data, encoding) if type(data) is str else bytes(data)


def _complex(real: Any, imag: Any) -> complex:
    _require({type(real), type(imag)} <= {int, float}, 'a bad complex number')
    return complex(real, imag)


def _size(items: Any = ()) -> torch.Size:
    _require(_is_shape(items), 'a bad torch.Size')
    return torch.Size(items)


def _device(kind: Any, index: Any = None) -> torch.device:
    _require(type(kind) is str and type(index) in (int, type(None)), 'a bad torch.device')
    return torch.device(kind) if index is None else torch.device(kind, index)


def _np_dtype(code: Any, align: Any = False, copy: Any = True) -> Any:
    simple = r'[<>=|]?([biufc][0-9]{1,2}|[SU][1-9][0-9]{0,5}|\?)'  # no records, dates, objects
    known = type(code) is str and re.fullmatch(simple, code)
    return np.dtype(code, False, True) if known else Placeholder('numpy.dtype')


def _versions(metadata: dict[Any, Any]) -> OrderedDict[str, dict[str, int]]:
    """The versions of the modules of a state_dict: all that files should say of a module.

    By another entry, ``assign_to_params_buffers``, a file would have its tensors take the place of
    the parameters, and the optimizer train those that nothing uses any more.
    """
    return OrderedDict(
        (name, {'version': entry['version']})
        for name, entry in metadata.items()
        if type(name) is str and type(entry) is dict and type(entry.get('version')) is int
    )


def _is_array(shape: Any, dtype: Any, raw: Any) -> bool:
    """Whether these describe an array exactly, so that numpy has nothing to guess."""
    known = isinstance(dtype, np.dtype) and _is_shape(shape) and type(raw) in (bytes, bytearray)
    return known and len(shape) <= 32 and len(raw) == math.prod(shape) * dtype.itemsize


def _np_scalar(dtype: Any, raw: Any = None) -> Any:
    known = _is_array((), dtype, raw)
    return np.ndarray((), dtype, bytes(raw))[()] if known else Placeholder('numpy.generic')


def _np_reconstruct(kind: Any, shape: Any, code: Any) -> Any:
    name = _name(kind) or 'numpy.ndarray'
    return np.empty(0, 'b') if name == 'numpy.ndarray' else Placeholder(name)


def _np_frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Any:
    if not _is_array(shape, dtype, raw):
        return Placeholder('numpy.ndarray')
    array = np.ndarray(shape, dtype, bytes(raw), order='F' if order == 'F' else 'C').copy('K')
    return array if axes is None else array.transpose(axes)


def _history_buffer() -> Any:
    try:
        from mmengine.logging import HistoryBuffer
    except ImportError:
        return Placeholder(_HISTORY_BUFFER)
    return HistoryBuffer()


def _getattr(owner: Any, name: Any, *default: Any) -> Any:
    """Names a method, as protocol 2 does. Nothing is looked up in an object."""
    known = _name(owner) and type(name) is str and len(owner.name) + len(name) < 300
    # What is found may be called in turn: its name must not be one that _CALLS knows.
    return _find(f'{owner.name}.{name}') if known else Placeholder('builtins.getattr()')


def _find(name: str) -> Any:
    if name in _DTYPES:
        return _DTYPES[name]
    # The schedule of a OneCycle scheduler, which MMEngine saves: two functions of numbers.
    for method in ('_annealing_cos', '_annealing_linear'):
        if name == f'{_ONE_CYCLE}.{method}':
            try:
                from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
            except ImportError:
                break
            return getattr(OneCycleParamScheduler, method)
    return Placeholder(name)


_TENSORS: dict = {
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
}
_WITH_KEYS: dict = {
    'collections.OrderedDict': _ordered_dict,
    'collections.Counter': _counter,
    'builtins.set': _collection(set),
    'builtins.frozenset': _collection(frozenset),
}
_CALLS: dict = {
    **_TENSORS,
    **_WITH_KEYS,
    'torch._tensor._rebuild_from_type_v2': _subclassed_tensor,
    'torch.Size': _size,
    'torch.device': _device,
    'collections.defaultdict': lambda factory=None: {},
    'builtins.bytes': _bytes,
    'builtins.bytearray': lambda *args: bytearray(_bytes(*args)),
    'builtins.complex': _complex,
    '_codecs.encode': _encode,
    'numpy.dtype': _np_dtype,
    'numpy._core.multiarray.scalar': _np_scalar,
    'numpy._core.multiarray._reconstruct': _np_reconstruct,
    'numpy._core.numeric._frombuffer': _np_frombuffer,
    'builtins.getattr': _getattr,
    _HISTORY_BUFFER: _history_buffer,
}
_DTYPES = {f'torch.{key}': v for key, v in vars(torch).items() if type(v) is torch.dtype}
_STORAGES = {
    'UntypedStorage': torch.uint8,
    'ByteStorage': torch.uint8,
    'CharStorage': torch.int8,
    'ShortStorage': torch.int16,
    'IntStorage': torch.int32,
    'LongStorage': torch.int64,
    'BoolStorage': torch.bool,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'FloatStorage': torch.float32,
    'DoubleStorage': torch.float64,
    'ComplexFloatStorage': torch.complex64,
    'ComplexDoubleStorage': torch.complex128,
}
_SIZED = (str, bytes, bytearray, list, tuple, set, frozenset, dict)
# Only these opcodes are taken from pickle: they make plain data, or move it about.
_PLAIN_OPCODES = (
    'PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE '
    'NONE NEWFALSE NEWTRUE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT '
    'STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 '
    'UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 GLOBAL STACK_GLOBAL '
    'TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 LIST EMPTY_LIST EMPTY_DICT EMPTY_SET'
)


class _Bounded:
    """A file that refuses a read past its end before the memory for it is allocated."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        _require(count <= self.size - self.file.tell(), 'the data ends early (truncated file?)')
        return self.file.read(count)


class _Unpickler(pickle._Unpickler):
    """An unpickler whose stack holds plain data, tensors, arrays and placeholders only.

    Args:
        file (BinaryIO): Where the pickle begins.
        size (int): Position of the end of the file.
        storage (Callable, optional): Gives the bytes of a storage as a tensor of type uint8, from
            its key, its size in bytes and the location (device) that it was saved from.
    """

    dispatch = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in _PLAIN_OPCODES.split()
    }

    def __init__(self, file: BinaryIO, size: int, storage: Any = None) -> None:
        super().__init__(_Bounded(file, size), encoding='utf-8')
        self.storage = storage
        self.size = size
        self.budget = 2**20 + 16 * size
        self.expanded = 0
        self.odd_keys = 0

    def load(self) -> Any:
        try:
            return super().load()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f'its pickle cannot be read: {type(error).__name__}: {error} (a damaged file, or '
                'not one of torch.save)'
            ) from error

    def find_class(self, module: str, name: str) -> Any:
        self.spend(module, name)
        name = f'{module}.{name}'
        for old, new in (('__builtin__.', 'builtins.'), ('numpy.core.', 'numpy._core.')):
            if name.startswith(old):
                name = new + name[len(old) :]
        return _find(name)

    def spend(self, *values: Any) -> None:
        # One string of a small file, copied by a million calls, would fill the memory.
        self.budget -= sum(len(value) for value in values if type(value) in _SIZED)
        _require(self.budget > 0, 'its pickle copies the same data again and again')

    def key(self, key: Any) -> Any:
        """Refuses keys that take forever or, being a recursion in C, crash the process."""
        todo = [key]
        for count, item in enumerate(todo):
            _require(count < 100, 'a dictionary key or set member that is nested too deeply')
            if isinstance(item, (tuple, frozenset)):
                todo.extend(item)
            elif isinstance(item, int):  # no hash of an int is kept: a long one costs every time
                _require(
                    abs(item) < 2**63,
                    f'an integer of {item.bit_length()} bits in a dictionary key or set member; '
                    'at most 63 are read there. Save such numbers as values or as text',
                )
        self.spend(*todo)  # they are compared
        if not _is_plain_key(key):
            self.odd_keys += len(todo)
            _require(
                self.odd_keys <= MAX_ODD_KEYS,
                f'more than {MAX_ODD_KEYS} numbers and other parts of dictionary keys and set '
                'members that are neither text nor integers below 2**32; such keys can be made to '
                'take forever. Use text or small integers as keys and save it again',
            )
        return key

    def expand(self, tensor: torch.Tensor) -> None:
        larger = tensor.numel() * tensor.element_size() - tensor.untyped_storage().nbytes()
        self.expanded += max(larger, 0)
        _require(
            self.expanded <= MAX_ALL_EXPANDED,
            f'expanded tensors that are {self.expanded} bytes larger than their storages, which is '
            f'more than {MAX_ALL_EXPANDED}. Save what was expanded, or contiguous copies',
        )

    def call(self, function: Any, args: Any, kwargs: Any = None) -> Any:
        _require(type(function) is Placeholder, f'a call of a {type(function).__name__}')
        known = _CALLS.get(function.name)
        if known is None or kwargs:
            return Placeholder(function.name if known is None else f'{function.name}()')
        _require(type(args) is tuple, f'a call of {function.name} without arguments')
        self.spend(*args)
        if function.name in _WITH_KEYS:
            return known(self.key, *args)
        result = known(*args)
        if type(result) is torch.Tensor:  # a parameter has been counted as a tensor
            self.expand(result)
        return result

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        kwargs, args = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args, kwargs)

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode('ascii') for _ in range(2))
        args = tuple(self.pop_mark())  # changes self.append
        self.append(self.call(self.find_class(module, name), args))

    def load_obj(self) -> None:
        function, *args = self.pop_mark()
        self.append(self.call(function, tuple(args)))

    def target(self, *kinds: type) -> Any:
        found = self.stack[-1]
        if type(found) in kinds:
            return found
        _require(type(found) is Placeholder, f'items for a {type(found).__name__}')
        return kinds[0]()  # takes what the placeholder does not

    def put(self, index: int) -> None:
        # The memo is a dictionary too. A pickler counts up from 0.
        _require(0 <= index <= self.size, 'a memo entry of a number that no pickler gives')
        self.memo[index] = self.stack[-1]

    def load_put(self) -> None:
        self.put(int(self.readline()[:-1]))

    def load_long_binput(self) -> None:
        self.put(int.from_bytes(self.read(4), 'little'))

    def load_append(self) -> None:
        item = self.stack.pop()
        self.target(list).append(item)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self.target(list).extend(items)

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.target(set).update(self.key(item) for item in items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.target(dict, OrderedDict)[self.key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        target = self.target(dict, OrderedDict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key)] = value

    def load_dict(self) -> None:
        self.metastack[-1].append({})  # below the mark
        self.load_setitems()

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(self.key(item) for item in items))

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack('<Q', self.read(8))
        self.append(bytearray(self.read(size)))

    def replace(self, old: Any, new: Any) -> None:
        self.stack[-1] = new
        self.spend(self.memo)  # is gone through: again and again, it would take forever
        self.memo.update({key: new for key, value in self.memo.items() if value is old})

    def load_build(self) -> None:
        """Sets the state of the few kinds of objects that have one, and nothing else in them."""
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is OrderedDict:
            metadata = state.get('_metadata') if type(state) is dict else None
            if type(metadata) in (dict, OrderedDict):
                self.spend(metadata)
                target._metadata = _versions(metadata)
        elif type(target) is np.ndarray:
            _, shape, dtype, fortran, raw = state
            if _is_array(shape, dtype, raw):
                self.spend(raw)
                target.__setstate__((1, shape, dtype, fortran is True, bytes(raw)))
            else:
                self.replace(target, Placeholder('numpy.ndarray'))
        elif isinstance(target, np.dtype):
            _, order, *fields = state
            if any(field is not None for field in fields[:3]):
                self.replace(target, Placeholder('numpy.dtype'))
            elif order in ('<', '>') and target.newbyteorder(order) != target:
                self.replace(target, target.newbyteorder(order))  # never change it in place
        elif type(target).__name__ == 'HistoryBuffer':  # no other class of this name can be here
            # Its own __setstate__ would write into a dictionary that belongs to the class.
            history = [state.get(key) for key in ('_log_history', '_count_history')]
            limit = state.get('max_length')
            known = all(
                type(a) is np.ndarray and a.ndim == 1 and a.dtype.kind in 'biuf' for a in history
            )
            if known and len(history[0]) == len(history[1]) and type(limit) is int and limit > 0:
                target._log_history, target._count_history = history
                target.max_length = limit
            else:
                self.replace(target, Placeholder(_HISTORY_BUFFER))

    def load_binpersid(self) -> None:
        pid = self.stack.pop()
        _require(type(pid) is tuple and len(pid) > 1 and type(pid[0]) is str, 'a bad persistent id')
        if pid[0] == 'module':  # the class of a pickled module, with its source
            self.append(Placeholder(_name(pid[1]) or 'torch.nn.Module'))
            return
        # A sixth item, a view, belongs to files older than torch 0.4.
        known = pid[0] == 'storage' and (len(pid) == 5 or (len(pid) == 6 and pid[5] is None))
        _require(known and self.storage is not None, 'a bad persistent id')
        _, kind, key, location, numel = pid[:5]
        dtype = _STORAGES.get(_name(kind).rpartition('.')[2])
        _require(dtype is not None, f'a storage of unknown type {_name(kind)}')
        for text in (key, location):
            _require(type(text) is str and len(text) < 256, 'a bad persistent id')
        _require(_is_shape((numel,)), 'a storage of a bad size')
        self.append(self.storage(key, numel * dtype.itemsize, location).view(dtype))

    for _opcode in [name for name in vars() if name.startswith('load_')]:
        dispatch[getattr(pickle, _opcode[5:].upper())[0]] = vars()[_opcode]
    dispatch[pickle.NEWOBJ[0]] = load_reduce  # has the same stack, and the same rules


# ---- The two file formats.


def _place(data: torch.Tensor, location: str, map_location: Any) -> torch.Tensor:
    """Moves the bytes of a storage to where ``torch.load`` would put them."""
    storage, placed = data.untyped_storage(), None
    try:
        if isinstance(map_location, (str, torch.device)):
            location = str(map_location)
        elif isinstance(map_location, dict):
            location = map_location.get(location, location)
        elif map_location is not None:
            placed = map_location(storage, location)
        if placed is None:
            placed = torch.serialization.default_restore_location(storage, location)
    except Exception as error:
        raise CheckpointError(f'no storage can be put on {location!r}: {error}') from error
    if placed is storage:
        return data
    flat = torch.empty(0, dtype=torch.uint8, device=placed.device)
    return flat.set_(placed, 0, (len(data),), (1,))


def _empty(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device='cpu')


def _fill(data: torch.Tensor, file: Any) -> torch.Tensor:
    """Reads a tensor of bytes on the CPU."""
    left, address = len(data), data.data_ptr()
    while left:
        part = file.read(min(left, 2**24))
        _require(0 < len(part) <= left, 'the data ends early (truncated file?)')
        # Not Tensor.numpy(), after which no storage can be resized.
        ctypes.memmove(address, part, len(part))
        left, address = left - len(part), address + len(part)
    return data


def _load_zip(file: BinaryIO, size: int, map_location: Any) -> Any:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            'a zip archive without its end: it is truncated or damaged; download or copy it again'
        ) from error
    with archive:
        infos = {info.filename: info for info in archive.infolist()}
        roots = [name[:-8] for name in infos if name.endswith('/data.pkl') and name.count('/') == 1]
        _require(
            roots,
            f'a zip archive, but no checkpoint: it holds {sorted(infos)[:3]} and no data.pkl. '
            'If it was packed for download, unpack it first',
        )
        root = roots[0]
        _require(
            not any(name.startswith((root + 'constants.pkl', root + 'code/')) for name in infos),
            'a TorchScript archive (a program, not only weights). Save the state_dict of the '
            'original model with torch.save instead',
        )
        _require(
            all(i.compress_type == 0 and i.compress_size == i.file_size for i in infos.values()),
            'a zip archive with compressed members, which torch.save never writes. Unpack it and '
            'write it with torch.save',
        )
        _require(
            sum(info.file_size for info in infos.values()) <= size,
            'a zip archive whose members overlap or are larger than the file',
        )

        def member(name: str) -> Any:
            _require(root + name in infos, f'the record {name!r} is missing')
            info = infos[root + name]
            if info.CRC == 0:  # torch.serialization.set_crc32_options(False) leaves it out
                info.CRC = None
            return archive.open(info)

        if root + 'byteorder' in infos:
            order = member('byteorder').read().decode('latin1')
            _require(order == sys.byteorder, f'its byte order is {order[:8]!r}')
        storages: dict = {}

        def storage(key: str, nbytes: int, location: str) -> torch.Tensor:
            if key not in storages:
                with member(f'data/{key}') as record:
                    found = infos[f'{root}data/{key}'].file_size
                    _require(found == nbytes, f'storage {key!r}: {found} bytes, not {nbytes}')
                    storages[key] = _place(_fill(_empty(nbytes), record), location, map_location)
            _require(len(storages[key]) == nbytes, f'storage {key!r} has two sizes')
            return storages[key]

        data = member('data.pkl').read()
        return _Unpickler(io.BytesIO(data), len(data), storage).load()


def _load_legacy(file: BinaryIO, size: int, map_location: Any) -> Any:
    magic = _Unpickler(file, size).load()
    _require(
        type(magic) is int and magic == _LEGACY_MAGIC,
        f'a plain pickle (of a {type(magic).__name__}), not a file of torch.save. Load it where '
        'you trust it and write it with torch.save',
    )
    version = _Unpickler(file, size).load()
    _require(type(version) is int and version == 1001, 'its legacy format is not of version 1001')
    _Unpickler(file, size).load()  # the sizes of C types: nothing depends on them
    _require(sys.byteorder == 'little', 'legacy files are not supported on big-endian machines')
    storages: dict = {}
    left = size - file.tell()

    def storage(key: str, nbytes: int, location: str) -> torch.Tensor:
        nonlocal left
        if key not in storages:
            left -= nbytes
            _require(left >= 0, 'storages larger than the file (truncated file?)')
            storages[key] = _place(_empty(nbytes), location, map_location)
        _require(len(storages[key]) == nbytes, f'storage {key!r} has two sizes')
        return storages[key]

    result = _Unpickler(file, size, storage).load()
    keys = _Unpickler(file, size).load()
    _require(
        type(keys) is list and len(keys) == len(storages) and all(type(k) is str for k in keys),
        'the list of its storages is damaged',
    )
    _require(set(keys) == set(storages), 'the list of its storages does not match its tensors')
    for key in keys:  # the contents come last, in this order
        header = file.read(8)
        _require(len(header) == 8, 'the data ends early (truncated file?)')
        nbytes, numel = len(storages[key]), int.from_bytes(header, 'little')
        _require(
            any(numel * width == nbytes for width in (1, 2, 4, 8, 16)),
            f'storage {key!r}: {numel} elements, but {nbytes} bytes',
        )
        if storages[key].device.type == 'cpu':
            _fill(storages[key], file)
        else:
            storages[key].copy_(_fill(_empty(nbytes), file))
    return result


def _load_safetensors(file: BinaryIO, map_location: Any) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(file.read())
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f'its safetensors header does not fit: {error}; the file is truncated or damaged'
        ) from error
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1).view(torch.uint8).clone()  # in a storage of its own
        placed = _place(flat, 'cpu', map_location)
        tensors[name] = placed.view(tensor.dtype).reshape(tensor.shape)
    return tensors


def _load(file: BinaryIO, map_location: Any) -> Any:
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(start)
    head = file.read(512)
    file.seek(start)
    again = 'the download probably failed: fetch it again and compare its size or hash'
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n')
    _require(head, f'the file is empty; {again}')
    # First of all: the length of its header, which it begins with, may look like text or like PK.
    # It is below 2**32.
    if head[4:9] == b'\x00\x00\x00\x00{':
        return _load_safetensors(file, map_location)
    _require(not text.startswith(b'<'), f'this looks like an HTML or XML page; {again}')
    _require(not text.startswith(b'version https://git-lfs'), 'a Git LFS pointer: run git lfs pull')
    _require(head[257:262] != b'ustar', 'a tar file: unpack what is in it')
    if head.startswith(b'PK'):
        result = _load_zip(file, size, map_location)
    else:
        _require(
            head.startswith(b'\x80'),
            f'no torch checkpoint: it begins with {head[:16]!r}. Expected a file of torch.save',
        )
        result = _load_legacy(file, size, map_location)
    _require(
        type(result) is not Placeholder,
        f'it holds a pickled object ({_name(result)}), not weights. Save the '
        'state_dict of the model instead',
    )
    return result


def safe_load(file: str | os.PathLike | BinaryIO, map_location: Any = 'cpu') -> Any:
    """Reads a checkpoint of ``torch.save`` or safetensors without running code from it.

    Tensors, numpy arrays and scalars, plain Python data and MMEngine's ``HistoryBuffer`` are read;
    a ``defaultdict`` becomes a dict, a tensor subclass a tensor. In the place of every other object
    stands a :class:`Placeholder`. A safetensors file gives a dict of tensors.

    Args:
        file (str | os.PathLike | BinaryIO): Path, or a seekable file that is open for reading.
        map_location (str | torch.device | dict | Callable, optional): Where storages go, as in
            :func:`torch.load`; None for the device that they were saved from.

    Returns:
        Any: The object that was saved.

    Raises:
        CheckpointError: If the file is damaged, of another format, or asks for what is not allowed.
        OSError: If the file cannot be opened.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, 'rb') as opened:
            return safe_load(opened, map_location)
    name = getattr(file, 'name', 'checkpoint')
    try:
        return _load(file, map_location)
    except CheckpointError as error:
        raise CheckpointError(f'cannot read {name}: {str(error)[:1000]}') from error.__cause__
    except Exception as error:
        raise CheckpointError(
            f'cannot read {name}: {type(error).__name__}: {str(error)[:1000]} (a damaged file?)'
        ) from error
