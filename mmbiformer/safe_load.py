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
import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
import sys
import unicodedata
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

MAX_EXPANDED = 2**26  # bytes of a tensor that is larger than its storage
MAX_ALL_EXPANDED = 2**28  # bytes that all tensors of a file are larger than their storages
MAX_ODD_KEYS = 6000  # numbers and the like in keys: what they cost grows with the square of this
MAX_NAME = 256  # characters of the dotted name of a class or a function
# What is made of a pickle may take BASE + FACTOR * its size bytes. Counted is what a few bytes of a
# file can make a lot of; the rest is at most 22 times as large as in the file (text of two bytes).
BASE, FACTOR = 2**26, 16
VERSION_KEY = 'version.'  # before the name of a module, in the metadata of safetensors
DIGEST_KEY = 'data_sha256'  # in the metadata of safetensors, which has no checksums of its own
MAX_HEADER = 2**24  # bytes of a header of safetensors in which metadata are sought
_BIDIRECTIONAL = '\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069'
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_HISTORY_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'
_ONE_CYCLE = 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'


def controls_terminal(text: str) -> bool:
    """Whether a text has characters that a terminal would obey, or could not be told.

    Not all that are not printable: classes have names with spaces that do not break, say.
    """
    return any(
        unicodedata.category(letter) in ('Cc', 'Cs') or letter in _BIDIRECTIONAL for letter in text
    )


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
    # Never format an object of the file: the repr of a crafted one takes forever. A name is short.
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
        return all(type(item) is str and item for item in key)
    if type(key) in (str, bytes):
        return len(key) > 0  # the empty text has the hash 0
    # Not of a class derived from these: numpy's text, for one, is no text to Unpickler.key.
    return type(key) in (Placeholder, torch.Tensor, torch.nn.Parameter)


# Those that make keys get Unpickler.fill first, which checks each.


def _set(fill: Callable, items: Any = ()) -> set:
    _require(type(items) in (list, tuple, set, frozenset), 'bad content of a set')
    return fill(set(), items)


def _frozenset(fill: Callable, items: Any = ()) -> frozenset:
    return frozenset(_set(fill, items))


def _ordered_dict(fill: Callable, pairs: Any = ()) -> OrderedDict:
    known = type(pairs) in (list, tuple) and all(type(pair) in (list, tuple) for pair in pairs)
    _require(known, 'bad content of an OrderedDict')
    return fill(OrderedDict(), pairs)


def _counter(fill: Callable, counts: Any = None) -> Counter:  # milestones of a MultiStep scheduler
    counts = {} if counts is None else counts
    _require(type(counts) is dict, 'bad content of a Counter')
    return fill(Counter(), counts.items())


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
    known = type(kind) is str and len(kind) < 64 and type(index) in (int, type(None))
    _require(known, 'a bad torch.device')
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
    if not _is_array(shape, dtype, raw) or not (axes is None or _is_shape(axes)):
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
    known = _name(owner) and type(name) is str and len(owner.name) + len(name) < MAX_NAME
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
    'builtins.set': _set,
    'builtins.frozenset': _frozenset,
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
# Only these opcodes are taken from pickle: they make plain data, or move it about.
_PLAIN_OPCODES = (
    'PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE '
    'NONE NEWFALSE NEWTRUE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT '
    'STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 '
    'UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 GLOBAL STACK_GLOBAL '
    'TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 LIST EMPTY_LIST EMPTY_DICT EMPTY_SET'
)
# What is made by one byte, in bytes; what is made from a mark has been paid there.
_COSTS = {
    **dict.fromkeys(('MARK', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'EMPTY_LIST', 'EMPTY_DICT'), 64),
    **dict.fromkeys(('EMPTY_SET', 'FROZENSET'), 256),
}
_KEY_COST = 128  # of an entry of a dictionary or a set
_CALL_COST = 384  # of the largest small object: a HistoryBuffer, a tensor without its dimensions


class _Bounded:
    """A file that refuses a read past its end before the memory for it is allocated."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        _require(count <= self.size - self.file.tell(), 'the data ends early (truncated file?)')
        return self.file.read(count)


def _paid(load: Callable, cost: int) -> Callable:
    def spend_and_load(unpickler: '_Unpickler') -> None:
        unpickler.spend(cost)
        load(unpickler)

    return spend_and_load


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
        self.budget = BASE + FACTOR * size
        self.expanded = 0
        self.odd_keys = 0

    def load(self) -> Any:
        """Reads one pickle; all that are read by this object have one budget."""
        self.memo: list = []  # smaller than the dictionary of pickle
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
        length = len(module) + len(name)
        _require(length < MAX_NAME, f'a class or function with a name of {length} characters')
        name = f'{module}.{name}'
        for old, new in (('__builtin__.', 'builtins.'), ('numpy.core.', 'numpy._core.')):
            if name.startswith(old):
                name = new + name[len(old) :]
        return self.made(_find(name))

    def spend(self, size: int) -> None:
        self.budget -= size
        _require(
            self.budget > 0,
            'its pickle would take far more memory or time than a file of its size needs, as the '
            'same data again and again does. Where you trust it, read it with torch.load and save '
            'only the state_dict',
        )

    def made(self, result: Any) -> Any:
        """Pays for what a call or a name in the file gave."""
        size = _CALL_COST + sys.getsizeof(result)  # all are of classes that this module chose
        if isinstance(result, torch.Tensor):
            size += 16 * result.dim()
        elif type(result) is Placeholder:
            size += sys.getsizeof(result.name)
        self.spend(size)
        return result

    def fill(self, target: Any, items: Any) -> Any:
        """Puts items into a set, or pairs into a dictionary; a placeholder takes none."""
        if type(target) is Placeholder:
            return target
        if type(target) is set:
            for item in items:
                self.check(item, len(target))
                target.add(item)
        else:
            for key, value in items:
                self.check(key, len(target))
                target[key] = value
        return target

    def check(self, key: Any, count: int) -> None:
        """Refuses keys that take forever or, being a recursion in C, crash the process.

        Args:
            key (Any): Key of a dictionary or member of a set.
            count (int): How many that holds by now.
        """
        todo = [key]
        for index, item in enumerate(todo):
            _require(index < 100, 'a dictionary key or set member that is nested too deeply')
            if isinstance(item, (tuple, frozenset)):
                todo.extend(item)
            elif isinstance(item, int):  # no hash of an int is kept: a long one costs every time
                _require(
                    abs(item) < 2**63,
                    f'an integer of {item.bit_length()} bits in a dictionary key or set member; '
                    'at most 63 are read there. Save such numbers as values or as text',
                )
        self.spend(_KEY_COST + sum(map(sys.getsizeof, todo)))  # they are compared
        if _is_plain_key(key):
            return
        # There are always at least 1.5 places for each that is there, and an integer that is below
        # their number has its own. Parameters, in an optimizer, are counted like that.
        if not (type(key) is int and 0 <= key < max(1.5 * count, 1024)):
            self.odd_keys += len(todo)
            _require(
                self.odd_keys <= MAX_ODD_KEYS,
                f'more than {MAX_ODD_KEYS} numbers and other parts of dictionary keys and set '
                'members that are neither text nor counted up from 0; such keys can be made to '
                'take forever. Use text as keys and save it again',
            )
        self.spend(2 * self.odd_keys)  # may be compared with all of them

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
            name = function.name if known is None else f'{function.name}()'
            return self.made(Placeholder(name))
        _require(type(args) is tuple, f'a call of {function.name} without arguments')
        if function.name in _WITH_KEYS:
            args = self.fill, *args
        result = self.made(known(*args))
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
        _require(type(found) in (*kinds, Placeholder), f'items for a {type(found).__name__}')
        return found

    def put(self, index: int) -> None:
        _require(0 <= index <= self.size, 'a memo entry of a number that no pickler gives')
        missing = index + 1 - len(self.memo)  # a pickler counts up, but may leave some out
        self.memo.extend([None] * missing)
        self.memo[index] = self.stack[-1]

    def load_memoize(self) -> None:
        self.memo.append(self.stack[-1])

    def load_put(self) -> None:
        self.put(int(self.readline()[:-1]))

    def load_binput(self) -> None:
        self.put(self.read(1)[0])

    def load_long_binput(self) -> None:
        self.put(int.from_bytes(self.read(4), 'little'))

    def extend(self, items: list) -> None:
        target = self.target(list)
        if type(target) is list:
            target.extend(items)

    def load_append(self) -> None:
        self.extend([self.stack.pop()])

    def load_appends(self) -> None:
        self.extend(self.pop_mark())

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.fill(self.target(set), items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill(self.target(dict, OrderedDict), [(key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        target = self.target(dict, OrderedDict)
        self.fill(target, zip(items[::2], items[1::2], strict=True))

    def load_dict(self) -> None:
        self.metastack[-1].append({})  # below the mark
        self.load_setitems()

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(_frozenset(self.fill, items))

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack('<Q', self.read(8))
        self.append(bytearray(self.read(size)))

    def replace(self, old: Any, new: Any) -> None:
        self.stack[-1] = self.made(new)
        self.spend(8 * len(self.memo))  # again and again, going through it would take forever
        self.memo = [new if value is old else value for value in self.memo]

    def load_build(self) -> None:
        """Sets the state of the few kinds of objects that have one, and nothing else in them."""
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is OrderedDict:
            metadata = state.get('_metadata') if type(state) is dict else None
            if type(metadata) in (dict, OrderedDict):
                self.spend(_CALL_COST * (1 + len(metadata)))
                target._metadata = _versions(metadata)
        elif type(target) is np.ndarray:
            # Of a tensor, unpacking would make as many as its first dimension.
            _require(type(state) is tuple, 'a bad state of an array')
            _, shape, dtype, fortran, raw = state
            if _is_array(shape, dtype, raw):
                self.spend(_CALL_COST + len(raw))
                target.__setstate__((1, shape, dtype, fortran is True, bytes(raw)))
            else:
                self.replace(target, Placeholder('numpy.ndarray'))
        elif isinstance(target, np.dtype):
            _require(type(state) is tuple, 'a bad state of a numpy.dtype')
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
            self.append(self.made(Placeholder(_name(pid[1]) or 'torch.nn.Module')))
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
        data = self.made(self.storage(key, numel * dtype.itemsize, location))
        self.append(self.made(data.view(dtype)))

    for _opcode in [name for name in vars() if name.startswith('load_')]:
        dispatch[getattr(pickle, _opcode[5:].upper())[0]] = vars()[_opcode]
    dispatch[pickle.NEWOBJ[0]] = load_reduce  # has the same stack, and the same rules
    for _opcode, _cost in _COSTS.items():
        dispatch[getattr(pickle, _opcode)[0]] = _paid(dispatch[getattr(pickle, _opcode)[0]], _cost)


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
            f'a zip archive, but no checkpoint: it holds {[n[:50] for n in sorted(infos)[:3]]} '
            'and no data.pkl. If it was packed for download, unpack it first',
        )
        root = roots[0]
        _require(
            len(roots) == 1 and len(infos) == len(archive.infolist()),
            'a zip archive that holds several checkpoints, or a name twice, so that each program '
            'may read another one; write it again with torch.save',
        )
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
    unpickler = _Unpickler(file, size)
    magic = unpickler.load()
    _require(
        type(magic) is int and magic == _LEGACY_MAGIC,
        f'a plain pickle (of a {type(magic).__name__}), not a file of torch.save. Load it where '
        'you trust it and write it with torch.save',
    )
    version = unpickler.load()
    _require(type(version) is int and version == 1001, 'its legacy format is not of version 1001')
    unpickler.load()  # the sizes of C types: nothing depends on them
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

    unpickler.storage = storage
    result = unpickler.load()
    keys = unpickler.load()
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


def safetensors_digest(content: bytes) -> str:
    """What stands under :data:`DIGEST_KEY`: of all that follows the header."""
    size = int.from_bytes(content[:8], 'little')
    return hashlib.sha256(memoryview(content)[8 + size :]).hexdigest()


def _load_safetensors(file: BinaryIO, map_location: Any) -> 'OrderedDict[str, torch.Tensor]':
    content = file.read()
    try:
        tensors = OrderedDict(safetensors.torch.load(content))
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f'its safetensors header does not fit: {error}; the file is truncated or damaged'
        ) from error
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1).view(torch.uint8).clone()  # in a storage of its own
        placed = _place(flat, 'cpu', map_location)
        tensors[name] = placed.view(tensor.dtype).reshape(tensor.shape)
    size = int.from_bytes(content[:8], 'little')
    # safetensors has read this header too, and found no more than texts in its metadata.
    header = json.loads(content[8 : 8 + size]) if size <= MAX_HEADER else {}
    metadata = header.get('__metadata__') or {}
    _require(
        DIGEST_KEY not in metadata or metadata[DIGEST_KEY] == safetensors_digest(content),
        'its weights are not those that were written: it is damaged; download or copy it again',
    )
    tensors._metadata = OrderedDict(
        (key.removeprefix(VERSION_KEY), {'version': int(text)})
        for key, text in metadata.items()
        if key.startswith(VERSION_KEY) and re.fullmatch(r'[0-9]{1,9}', text)
    )
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
    stands a :class:`Placeholder`. A safetensors file gives a dict of tensors, with the versions of
    modules that its metadata name under :data:`VERSION_KEY`.

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
        # Opening a pipe would wait for ever; a folder or what is not there says so by itself.
        if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
            raise CheckpointError(f'cannot read {file}: it is a pipe or a device; give a file')
        with open(file, 'rb') as opened:
            return safe_load(opened, map_location)
    name = getattr(file, 'name', 'checkpoint')
    try:
        return _load(file, map_location)
    except Exception as error:
        # Here alone a message leaves: what is shown of a file is short, and controls no terminal.
        # No cause, which would be shown too.
        text = str(error)[:1000]
        if not isinstance(error, CheckpointError):
            text = f'{type(error).__name__}: {text} (a damaged file?)'
        text = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        raise CheckpointError(f'cannot read {name}: {text}') from None
