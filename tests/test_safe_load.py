"""The checkpoint reader: what it reads, and that nothing in a file runs or changes anything."""

import argparse
import contextlib
import copy
import io
import os
import pickle
import random
import struct
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from mmbiformer import safe_load as module
from mmbiformer.safe_load import CheckpointError, Placeholder, safe_load

FORMATS = [(True, 2), (True, 4), (True, 5), (False, 2), (False, 4)]
RAN = []


def run(*args):
    RAN.append(args)


@pytest.fixture(autouse=True)
def nothing_happened(tmp_path, monkeypatch):
    """Whatever a test reads: no code ran, and no class or table was changed."""
    from mmengine.logging import HistoryBuffer

    HistoryBuffer()  # registers its own methods
    monkeypatch.chdir(tmp_path)
    classes = (OrderedDict, Placeholder, HistoryBuffer, torch.Tensor, argparse.Namespace)
    tables = (module._CALLS, module._DTYPES, HistoryBuffer._statistics_methods)

    def look():
        found = [dict(vars(cls)) for cls in classes] + [dict(table) for table in tables]
        for part in found:
            part.pop('__slotnames__', None)  # written by pickling
        return found, [repr(np.dtype(code)) for code in ('f4', 'f8', 'i8', 'U2')]

    before = look()
    RAN.clear()
    yield
    assert not RAN
    assert not (tmp_path / 'canary').exists() and 'evil_module' not in sys.modules
    assert look() == before


def saved(value, zip_format=True, protocol=2):
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zip_format)
    buffer.seek(0)
    return buffer


def archive(data, records=None, compression=zipfile.ZIP_STORED, root='archive'):
    """A zip checkpoint around a pickle made by hand."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compression) as file:
        for name, content in {'data.pkl': data, 'version': b'3\n', **(records or {})}.items():
            file.writestr(f'{root}/{name}', content)
    buffer.seek(0)
    return buffer


def text(value):
    value = value.encode()
    return b'X' + struct.pack('<I', len(value)) + value


def call(module_name, name, *args):
    return f'c{module_name}\n{name}\n'.encode() + b'(' + b''.join(args) + b'tR'


def storage(key='0', numel=4, kind='FloatStorage', location='cpu'):
    number = b'\x8a\x09' + numel.to_bytes(9, 'little', signed=True)
    head = b'(' + text('storage') + f'ctorch\n{kind}\n'.encode()
    return head + text(key) + text(location) + number + b'tQ'


def raw_tensor(size=b'K\x04\x85', stride=b'K\x01\x85', offset=b'K\x00', content=None):
    args = (content or storage(), offset, size, stride, b'\x89', b'N')
    return call('torch._utils', '_rebuild_tensor_v2', *args)


def in_dict(**values):
    return b'\x80\x02}(' + b''.join(text(k) + v for k, v in values.items()) + b'u.'


# ---- What is read.


@pytest.mark.parametrize('zip_format, protocol', FORMATS)
def test_tensors(zip_format, protocol):
    reals = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64)
    others = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in reals + others}
    base = torch.randn(4, 6)
    linear = torch.nn.Linear(2, 3)
    linear.weight.note = 'kept in the state of the parameter'
    tensors.update(
        base=base,
        view=base[1:3, ::2],
        transposed=base.t(),
        last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        expanded=torch.ones(1).expand(1000, 1000),
        scalar=torch.tensor(3.0),
        empty=torch.empty(0, 3),
        leaf=torch.ones(2, requires_grad=True),
        weight=linear.weight,
        frozen=torch.nn.Parameter(torch.ones(2), requires_grad=False),
    )
    tensors['noted'] = torch.ones(3)
    tensors['noted'].note = 'dropped'
    loaded = safe_load(saved(tensors, zip_format, protocol))
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        found = loaded[name]
        assert torch.equal(found, tensor), name
        assert (found.dtype, found.stride(), found.requires_grad, type(found)) == (
            tensor.dtype, tensor.stride(), tensor.requires_grad, type(tensor)
        )  # fmt: skip
    assert not hasattr(loaded['noted'], 'note') and not hasattr(loaded['weight'], 'note')
    loaded['base'][1, 0] = 7
    assert loaded['view'][0, 0] == 7 and loaded['transposed'][0, 1] == 7
    loaded['torch.bool'].resize_(100)  # storages are ordinary ones


@pytest.mark.parametrize('name', ['uint16', 'uint32', 'uint64', 'float8_e4m3fn'])
def test_new_dtypes(name):
    tensor = torch.arange(6).to(getattr(torch, name))
    try:
        file = saved({'a': tensor})
    except KeyError:
        pytest.skip(f'this torch cannot save {name} itself: there are no such files of it')
    found = safe_load(file)['a']
    assert found.dtype == tensor.dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize('zip_format, protocol', FORMATS)
def test_plain_data(zip_format, protocol):
    data = {
        'plain': [None, True, 3, -(2**70), 2.5, 'text é', b'', b'bytes\xff', bytearray(b'x'), 1j],
        'nested': ({1, 2}, frozenset({3}), set(), (), [[]], {'a': {'b': (1,)}}),
        'torch': (torch.Size([1, 2]), torch.device('cuda', 0), torch.device('cpu'), torch.bfloat16),
        'milestones': Counter([3, 3, 5]),
        'ordered': OrderedDict(b=1, a=2),
        (1, 'key'): torch.Size([]),
    }
    data['self'] = data
    loaded = safe_load(saved(data, zip_format, protocol))
    assert loaded.pop('self') is loaded
    del data['self']
    assert loaded == data and repr(loaded) == repr(data)
    assert loaded['milestones'][4] == 0
    groups = safe_load(saved(defaultdict(list, a=[1]), zip_format, protocol))
    assert type(groups) is dict and groups == {'a': [1]}


@pytest.mark.parametrize('zip_format, protocol', FORMATS)
def test_numpy(zip_format, protocol):
    arrays = [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.ones((2, 3), 'f4')),
        np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
        np.array(['ab', 'c']),
        np.array([True, False]),
        np.zeros((0, 4), 'i2'),
        np.array(3, 'u1'),
        np.arange(3, dtype='>i4'),
    ]
    scalars = [np.float64(2.5), np.float32(1), np.int64(-1), np.bool_(True), np.str_('ab')]
    dtypes = [np.dtype('>f4'), np.dtype('f4')]
    data = {'arrays': arrays, 'again': arrays[0], 'scalars': scalars, 'dtypes': dtypes}
    loaded = safe_load(saved(data, zip_format, protocol))
    for found, array in zip(loaded['arrays'], arrays, strict=True):
        assert type(found) is np.ndarray
        assert found.dtype == pickle.loads(pickle.dumps(array, protocol)).dtype  # may be swapped
        assert np.array_equal(found, array) and found.flags.writeable
    assert loaded['again'] is loaded['arrays'][0]
    assert loaded['scalars'] == scalars
    assert [type(item) for item in loaded['scalars']] == [type(item) for item in scalars]
    assert loaded['dtypes'] == dtypes


def test_old_numpy_names():
    data = saved({'a': np.arange(3), 'b': np.float32(2)})
    with zipfile.ZipFile(data) as file:
        content = file.read('archive/data.pkl').replace(b'numpy._core.', b'numpy.core.')
    loaded = safe_load(archive(content))
    assert loaded['b'] == 2 and loaded['a'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('value', [
    np.array([None, 'a'], dtype=object),
    np.array([(1, 2.0)], dtype=[('a', 'i4'), ('b', 'f8')]),
    np.array(['2020-01-01'], dtype='M8[D]'),
    np.datetime64('2020-01-01'),
])  # fmt: skip
def test_other_arrays_are_placeholders(value):
    for protocol in (2, 5):
        loaded = safe_load(saved({'a': value, 'b': value, 'w': torch.ones(2)}, True, protocol))
        assert type(loaded['a']) is Placeholder and loaded['a'] is loaded['b']
        assert torch.equal(loaded['w'], torch.ones(2))


@pytest.mark.parametrize('map_location', [
    None, 'cpu', torch.device('cpu'), {'cpu': 'cpu'}, lambda storage, location: storage, 'meta',
    lambda storage, location: None,
])  # fmt: skip
@pytest.mark.parametrize('zip_format', [True, False])
def test_map_location(map_location, zip_format):
    tensor = torch.randn(3, 2).t()
    found = safe_load(saved([tensor], zip_format), map_location)[0]
    assert found.device.type == ('meta' if map_location == 'meta' else 'cpu')
    assert found.is_meta or torch.equal(found, tensor)
    assert found.stride() == tensor.stride()


def test_saved_on_a_gpu():
    data = in_dict(w=raw_tensor(content=storage(location='cuda:7')))
    records = {'data/0': np.arange(4, dtype='f4').tobytes()}
    assert safe_load(archive(data, records))['w'].tolist() == [0, 1, 2, 3]
    if not torch.cuda.is_available():
        with pytest.raises(CheckpointError, match="no storage can be put on 'cuda:7'"):
            safe_load(archive(data, records), map_location=None)


def test_module_state_dict(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(model.state_dict(), 'model.pth')
    for file in ('model.pth', tmp_path / 'model.pth'):
        state = safe_load(file)
        assert type(state) is OrderedDict and state._metadata == model.state_dict()._metadata
        model.load_state_dict(state)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    loaded = safe_load(saved(optimizer.state_dict()))
    optimizer.load_state_dict(loaded)
    assert str(loaded) == str(optimizer.state_dict())


@pytest.mark.skipif(
    not hasattr(torch.serialization, 'set_crc32_options'),
    reason='torch < 2.6 always writes checksums',
)
def test_without_crc():
    torch.serialization.set_crc32_options(False)
    try:
        buffer = saved(torch.ones(3))
    finally:
        torch.serialization.set_crc32_options(True)
    assert safe_load(buffer).tolist() == [1, 1, 1]


class Node:
    """As omegaconf: slots, parents, and a dict of children as state."""

    def __init__(self, parent, content):
        self.__dict__['_parent'] = parent
        self.__dict__['_content'] = content

    def __getattr__(self, name):
        raise RuntimeError('must not be asked for anything')

    def __reduce_ex__(self, protocol):
        return (Node.__new__, (Node,), dict(self.__dict__))

    def __setstate__(self, state):
        run('setstate')


class Slotted:
    __slots__ = ('value',)

    def __init__(self, value):
        self.value = value


class ListLike(list):
    pass


class DictLike(dict):
    pass


@pytest.mark.parametrize('zip_format, protocol', FORMATS)
def test_placeholders(zip_format, protocol, monkeypatch):
    monkeypatch.setattr(Node, '__getattr__', object.__getattribute__)
    root = Node(None, {})
    root.__dict__['_content'] = {'lr': Node(root, 0.1)}
    weight = torch.randn(2, 2)
    data = {
        'args': argparse.Namespace(lr=0.1, model='biformer', weight=weight, out=ListLike([1])),
        'cfg': root,
        'others': [Slotted(weight), ListLike([1, 2]), DictLike(a=1), Slotted, range(3), slice(1)],
        'function': run,
        'keys': {Slotted(1): 1},
        'set': {Slotted(2)},
        'model': {'weight': weight},
    }
    loaded = safe_load(saved(data, zip_format, protocol))
    args = loaded['args']
    assert repr(args) == "Placeholder('argparse.Namespace')" and not hasattr(args, 'lr')
    assert {args: 1}[args] == 1 and args != loaded['cfg']
    assert copy.deepcopy(args).name == pickle.loads(pickle.dumps(args)).name == args.name
    assert type(loaded['cfg']) is Placeholder and type(loaded['function']) is Placeholder
    assert [type(item) for item in loaded['others']] == [Placeholder] * 6
    assert [item.name for item in loaded['others'][:4]] == [
        f'{__name__}.{name}' for name in ('Slotted', 'ListLike', 'DictLike', 'Slotted')
    ]
    for found in (*loaded['set'], *loaded['keys']):
        assert repr(found) == f"Placeholder('{__name__}.Slotted')"
    assert torch.equal(loaded['model']['weight'], weight)


def runner_checkpoint():
    from mmengine.logging import HistoryBuffer, MessageHub
    from mmengine.optim import MultiStepLR, OneCycleLR

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedulers = [
        MultiStepLR(optimizer, milestones=[2, 4]),
        OneCycleLR(torch.optim.SGD(model.parameters(), lr=0.1), eta_max=1.0, total_steps=10),
    ]
    hub = MessageHub('test_safe_load')
    hub.update_scalar('train/loss', 0.5)
    hub.update_scalar('train/loss', np.float32(1.5).item())
    hub.update_info('iter', 7)
    hub.update_scalar('train/lr', 1)
    hub.log_scalars['train/lr'] = HistoryBuffer([1, 2, 3], [1, 1, 2], max_length=50)
    return {
        'meta': {'cfg': 'a = 1', 'dataset_meta': {'classes': ('a', 'b'), 'palette': [(1, 2, 3)]}},
        'state_dict': model.state_dict(),
        'message_hub': hub.state_dict(),
        'optimizer': optimizer.state_dict(),
        'param_schedulers': [scheduler.state_dict() for scheduler in schedulers],
    }, schedulers


@pytest.mark.parametrize('zip_format, protocol', FORMATS)
def test_runner_checkpoint(zip_format, protocol):
    from mmengine.logging import HistoryBuffer, MessageHub

    checkpoint, schedulers = runner_checkpoint()
    loaded = safe_load(saved(checkpoint, zip_format, protocol))
    losses = loaded['message_hub']['log_scalars']['train/loss']
    assert type(losses) is HistoryBuffer and losses.max_length == 1000000
    assert (losses.mean(), losses.statistics('min'), losses.current()) == (1.0, 0.5, 1.5)
    losses.update(4.0)
    assert losses.statistics('mean') == 2.0
    rates = loaded['message_hub']['log_scalars']['train/lr']
    assert rates.max_length == 50 and [part.tolist() for part in rates.data] == [
        [1, 2, 3], [1, 1, 2]
    ]  # fmt: skip
    MessageHub('test_safe_load_resumed').load_state_dict(loaded['message_hub'])
    for scheduler, state in zip(schedulers, loaded['param_schedulers'], strict=True):
        before = scheduler.state_dict()
        assert state == before
        scheduler.load_state_dict(state)
        scheduler.optimizer.step()
        scheduler.step()
    assert loaded['meta'] == checkpoint['meta']
    again = safe_load(saved(loaded, zip_format, protocol))
    assert again['message_hub']['log_scalars']['train/lr'].data[0].tolist() == [1, 2, 3]


def test_history_buffer_without_mmengine(monkeypatch):
    buffer = saved(runner_checkpoint()[0])
    monkeypatch.setitem(sys.modules, 'mmengine.logging', None)
    monkeypatch.setitem(sys.modules, 'mmengine.optim.scheduler.param_scheduler', None)
    loaded = safe_load(buffer)
    assert type(loaded['message_hub']['log_scalars']['train/lr']) is Placeholder
    assert type(loaded['param_schedulers'][1]['anneal_func']) is Placeholder


# ---- What is refused, and how it is said.


CONTENTS = [
    (b'', 'empty'),
    (b'<!DOCTYPE html><html>', 'HTML'),
    (b'\n  <?xml version="1.0"?>', 'HTML or XML'),
    (b'version https://git-lfs.github.com/spec/v1\noid', 'git lfs pull'),
    (b'just some text', 'no torch checkpoint: it begins with'),
    (b'\x1f\x8b\x08\x00', 'no torch checkpoint'),
    (struct.pack('<Q', 1000) + b'{"a":', 'safetensors header'),
    (struct.pack('<Q', 0x80) + b'{"a":1' + b' ' * 200, 'safetensors'),
    (pickle.dumps({'a': 1}), 'a plain pickle .of a dict'),
    (pickle.dumps([1, 2], 2)[:-4], 'ends early|cannot be read'),
    (pickle.dumps(run), 'a plain pickle'),
    (b'PK\x03\x04 and nothing more', 'truncated or damaged'),
    (b'\x80', 'ends early'),
    (b'\x80\x02(((', 'ends early'),
    (b'\x80\xff.', 'ValueError'),
    (b'\x80\x02\x82\x01.', 'KeyError'),
]  # fmt: skip


@pytest.mark.parametrize('content, message', CONTENTS, ids=range(len(CONTENTS)))
def test_not_a_checkpoint(content, message, tmp_path):
    path = tmp_path / 'file.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as info:
        safe_load(path)
    assert str(path) in str(info.value)
    with pytest.raises(CheckpointError, match=message):
        safe_load(io.BytesIO(content))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match='nowhere'):
        safe_load('nowhere.pth')


@pytest.mark.parametrize('zip_format', [True, False])
def test_truncated(zip_format):
    content = saved({'a': torch.randn(100), 'b': [1, 'x' * 50]}, zip_format).getvalue()
    for end in range(1, len(content), 23):
        with pytest.raises(CheckpointError):
            safe_load(io.BytesIO(content[:end]))


def test_damaged():
    content = bytearray(saved({'a': torch.ones(100)}).getvalue())
    content[content.index(np.ones(9, 'f4').tobytes()) + 5] ^= 1
    with pytest.raises(CheckpointError, match='CRC'):
        safe_load(io.BytesIO(content))


def test_other_archives(tmp_path):
    script = archive(in_dict(), {'constants.pkl': b'\x80\x02).', 'code/a.py': b'run()'}).getvalue()
    (tmp_path / 'script.pt').write_bytes(script)
    with pytest.raises(CheckpointError, match='TorchScript'):
        safe_load('script.pt')
    with tarfile.open('model.tar', 'w') as file:
        file.add('script.pt')
    with pytest.raises(CheckpointError, match='tar file'):
        safe_load('model.tar')
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as file:
        file.write('script.pt')
    with pytest.raises(CheckpointError, match=r'no data\.pkl.*unpack'):
        safe_load(buffer.seek(0) or buffer)


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('name', ['archive/data/0', 'archive/data.pkl', 'another/data.pkl'])
def test_zip_that_each_program_reads_otherwise(name):
    """Of two members of one name zipfile takes the last, PyTorch the first."""
    buffer = archive(in_dict(w=raw_tensor()), {'data/0': bytes(16)})
    assert safe_load(buffer)['w'].tolist() == [0] * 4
    with zipfile.ZipFile(buffer, 'a') as file:
        file.writestr(name, b'\x01' * 16)
    with pytest.raises(CheckpointError, match='several checkpoints, or a name twice'):
        safe_load(buffer.seek(0) or buffer)


def test_zip_bombs():
    data = in_dict(w=raw_tensor())
    with pytest.raises(CheckpointError, match='compressed'):
        safe_load(archive(data, {'data/0': bytes(10**6)}, zipfile.ZIP_DEFLATED))
    buffer = archive(data, {'data/0': bytes(16), 'data/1': bytes(2000)})
    content = bytearray(buffer.getvalue())
    for name in (b'archive/data/0', b'archive/data/1'):  # the sizes in the central directory
        position = content.rindex(name)
        content[position - 26 : position - 18] = struct.pack('<II', 1900, 1900)
    with pytest.raises(CheckpointError, match='overlap'):
        safe_load(io.BytesIO(content))


BAD_PICKLES = [
    (raw_tensor(size=b'K\x05\x85'), 'does not fit'),
    (raw_tensor(offset=b'K\x01'), 'does not fit'),
    (raw_tensor(offset=b'J\xff\xff\xff\xff'), 'shape'),
    (raw_tensor(stride=b'J\xff\xff\xff\xff\x85'), 'shape'),
    (raw_tensor(stride=b'K\x01K\x01\x86'), 'shape'),
    (raw_tensor(size=b'\x8a\x08' + b'\xff' * 7 + b'\x3f\x85', stride=b'K\x00\x85'), 'expanded'),
    (raw_tensor(size=b'\x8a\x09' + b'\x00' * 8 + b'\x01\x85', stride=b'K\x00\x85'), 'shape'),
    (raw_tensor(size=b'(' + b'K\x01' * 100 + b't', stride=b'(' + b'K\x01' * 100 + b't'), 'shape'),
    (raw_tensor(size=b'J\x00\x00\x00\x7f\x85', stride=b'K\x00\x85'), 'expanded from 16 bytes'),
    (raw_tensor(content=storage(numel=2**40)), '16 bytes, not'),
    (raw_tensor(content=storage(numel=2**62)), '16 bytes, not'),
    (raw_tensor(content=storage(numel=-1)), 'bad size'),
    (raw_tensor(content=storage('9')), "record 'data/9' is missing"),
    (raw_tensor(content=storage('../version')), 'missing'),
    (raw_tensor(content=storage(kind='EvilStorage')), 'unknown type torch.EvilStorage'),
    (raw_tensor(content=b'N'), 'without a storage'),
    (raw_tensor(content=b'cos\nsystem\n'), 'without a storage'),
    (text('storage') + b'Q', 'persistent id'),
    (b'(tQ', 'persistent id'),
    (b'(' + text('storage') + b'tQ', 'persistent id'),
    (b'(' + text('storage') + b'NNNNtQ', 'unknown type'),
    (b'(' + text('storage') + b'ctorch\nFloatStorage\nNNNtQ', 'persistent id'),
    (b'Pid\n', 'KeyError'),
    (call('builtins', 'bytearray', b'\x8a\x06' + b'\x00' * 5 + b'\x01'), 'bad content'),
    (call('builtins', 'bytes', b'J\xff\xff\xff\x7f'), 'bad content'),
    (call('builtins', 'set', b'J\xff\xff\xff\x7f'), 'bad content'),
    (call('_codecs', 'encode', text('a'), text('zlib')), 'bad encoded'),
    (call('torch', 'device', text('nonsense')), 'cannot be read'),
    (b'\x96' + b'\xff' * 7 + b'\x0f', 'ends early'),
    (b'\x8e' + b'\xff' * 7 + b'\x0f', 'ends early'),
    (b'\x95' + b'\xff' * 7 + b'\x0f', 'ends early'),
    (b'N(K\x01e0', 'items for a NoneType'),
    (b'h\x63', 'cannot be read'),
    (b'b', 'cannot be read'),
    (b'NNR', 'a call of a NoneType'),
    (b'ccollections\nOrderedDict\nNR', 'without arguments'),
]  # fmt: skip


@pytest.mark.parametrize('tensor, message', BAD_PICKLES, ids=range(len(BAD_PICKLES)))
def test_bad_pickles(tensor, message):
    with pytest.raises(CheckpointError, match=message):
        safe_load(archive(in_dict(w=tensor), {'data/0': bytes(16)}))


def test_bad_legacy_storages():
    content = saved({'a': torch.arange(4.0), 'b': torch.ones(2)}, False).getvalue()
    numel = content.rindex(struct.pack('<q', 4))
    for old, new in [
        (content[numel : numel + 8], struct.pack('<q', 5)),
        (content[numel : numel + 8], struct.pack('<q', -4)),
        (b'K\x04N', b'K\xffN'),  # declared larger in the persistent id
    ]:
        assert old in content
        with pytest.raises(CheckpointError):
            safe_load(io.BytesIO(content.replace(old, new)))
    head = saved(None, False).getvalue()
    head = head[: head.index(b'\x80\x02N.')]
    data = in_dict(w=raw_tensor(content=storage(numel=2**50)[:-2] + b'NtQ')) + b'\x80\x02](X\x01'
    with pytest.raises(CheckpointError, match='larger than the file'):
        safe_load(io.BytesIO(head + data))


def test_deep_keys_and_copies():
    """What would take forever, crash the interpreter, or fill the memory."""
    deep = b'\x80\x02})' + b'\x85' * 10**6 + b'Ns.'
    shared = b'\x80\x02})' + b'2\x86' * 100 + b'Ns.'
    for data in (deep, shared):  # ((((...),),),) and t = (t, t), again and again
        with pytest.raises(CheckpointError, match='too deeply'):
            safe_load(archive(data))
    string = text('x' * 10**6) + b'q\x00' + text('latin1') + b'q\x010c_codecs\nencode\nq\x020'
    copies = b'\x80\x02](' + string + b'h\x02(h\x00h\x01tR' * 1000 + b'e.'
    with pytest.raises(CheckpointError, match='again and again'):
        safe_load(archive(copies))


def test_no_object_is_formatted():
    """The repr of shared nested lists would take forever, also in an error message."""
    bomb = b']' + b'2\x86' * 60
    nested = call('torch._tensor', '_rebuild_from_type_v2', bomb, b'N', b')', b'N')
    for data in (nested, bomb + b'Q', bomb + b')R'):
        with pytest.raises(CheckpointError):
            safe_load(archive(in_dict(w=data)))


def test_whole_objects():
    with pytest.raises(CheckpointError, match=r'pickled object \(torch\.nn\.'):
        safe_load(saved(torch.nn.Linear(1, 1)))
    with pytest.raises(CheckpointError, match='Linear'):
        safe_load(saved(torch.nn.Linear(1, 1), False))


def test_random_changes():
    """Whatever a byte is changed to: a result or a CheckpointError."""
    checkpoint, _ = runner_checkpoint()
    checkpoint['args'] = argparse.Namespace(lr=1)
    with zipfile.ZipFile(saved(checkpoint)) as file:
        records = {name[8:]: file.read(name) for name in file.namelist()}
    legacy = saved(checkpoint, False).getvalue()
    rng = random.Random(0)
    for index in range(400):
        source = legacy if index % 2 else records['data.pkl']
        content = bytearray(source)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.choice([rng.randrange(256), 82, 98, 46, 48])
        file = io.BytesIO(content) if index % 2 else archive(
            bytes(content), {k: v for k, v in records.items() if k != 'data.pkl'}
        )  # fmt: skip
        with contextlib.suppress(CheckpointError):
            safe_load(file)


# ---- Attacks. The fixture above checks that nothing ran and nothing changed.


class Evil:
    """Pickles as a call."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


EVIL = {
    'system': lambda: Evil(os.system, 'echo > canary'),
    'exec': lambda: Evil(exec, "open('canary', 'w')"),
    'eval': lambda: Evil(eval, "open('canary', 'w')"),
    'open': lambda: Evil(open, 'canary', 'w'),
    'own': lambda: Evil(run, 1),
    'import': lambda: Evil(__import__, 'evil_module'),
    'nested': lambda: Evil(pickle.loads, pickle.dumps(Evil(run, 2))),
    'torch.load': lambda: Evil(torch.load, io.BytesIO(saved(Evil(run, 3)).getvalue())),
    'getattr': lambda: Evil(getattr, Node, '__init__'),
    'state': lambda: Evil(Node, None, state={'a': Evil(run, 4)}),
}
PLACES = {
    'item': lambda evil: {'evil': evil},
    'list': lambda evil: {'evil': [evil, (evil,)]},
    'namespace': lambda evil: {'evil': argparse.Namespace(a=evil, b={'c': evil})},
    'key': lambda evil: {'keys': {evil: 1}},
    'set': lambda evil: {'set': {evil}},
    'argument': lambda evil: {'evil': Evil(argparse.Namespace, evil)},
    'ordered': lambda evil: {'evil': OrderedDict(a=evil)},
    'array': lambda evil: {'evil': np.array([evil, evil], dtype=object)},
}


@pytest.mark.parametrize('evil', EVIL)
@pytest.mark.parametrize('place', PLACES)
def test_calls(evil, place):
    for zip_format, protocol in FORMATS:
        data = {'w': torch.arange(3), **PLACES[place](EVIL[evil]())}
        try:
            buffer = saved(data, zip_format, protocol)
        finally:
            RAN.clear()
        loaded = safe_load(buffer)
        assert loaded['w'].tolist() == [0, 1, 2]
        if place == 'item':
            assert type(loaded['evil']) is Placeholder


@pytest.mark.parametrize('evil', EVIL)
def test_calls_at_the_top(evil):
    for zip_format, protocol in FORMATS:
        with pytest.raises(CheckpointError, match='pickled object'):
            safe_load(saved(EVIL[evil](), zip_format, protocol))
    with pytest.raises(CheckpointError):
        safe_load(io.BytesIO(pickle.dumps(EVIL[evil]())))


def test_evil_metadata_and_tensor_arguments():
    state = OrderedDict(w=torch.ones(2))
    state._metadata = OrderedDict(a=Evil(run, 1))
    state.extra = Evil(run, 2)
    loaded = safe_load(saved(state))
    assert list(loaded) == ['w'] and list(vars(loaded)) == ['_metadata']
    state._metadata = Evil(run, 3)
    assert not vars(safe_load(saved(state)))
    tensor = torch.ones(2)
    tensor.hook = Evil(run, 4)
    assert safe_load(saved([tensor]))[0].tolist() == [1, 1]
    system = call('os', 'system', text('echo > canary'))
    for position in range(6):
        args = [storage(), b'K\x00', b'K\x04\x85', b'K\x01\x85', b'\x88', b'N']
        args[position] = system
        data = in_dict(w=call('torch._utils', '_rebuild_tensor_v2', *args))
        try:
            found = safe_load(archive(data, {'data/0': bytes(16)}))['w']
            assert found.tolist() == [0] * 4 and not found._backward_hooks
        except CheckpointError:
            assert position < 4


ATTACKS = [
    # an instance, an old-style object, and __newobj_ex__
    b'(' + text('echo > canary') + b'ios\nsystem\n',
    b'(cos\nsystem\n' + text('echo > canary') + b'o',
    b'cos\nsystem\n' + text('echo > canary') + b'\x85}\x92',
    b'cos\nsystem\n' + text('echo > canary') + b'\x85\x81',
    # a module that exists beside the file
    b'cevil_module\nrun\n)R',
    # getattr chains, up to builtins.exec
    call('__builtin__', 'getattr', b'cmmengine.logging.history_buffer\nHistoryBuffer\n',
         text('__init__')),
    call('builtins', 'getattr', call('builtins', 'getattr', call(
        'builtins', 'getattr', b'cmmengine.logging.history_buffer\nHistoryBuffer\n',
        text('__init__')), text('__globals__')), text('__getitem__')),
    call('builtins', 'getattr', b'cbuiltins\ngetattr\n', text('__self__')),
    call('builtins', 'getattr', b'N', text('__class__')),
    call('operator', 'attrgetter', text('system')) + b'cos\nsystem\n\x85R',
    call('functools', 'partial', b'cos\nsystem\n', text('echo > canary')) + b')R',
    # names with dots, as protocol 4 allows them
    text('mmengine.logging.history_buffer') + text('HistoryBuffer.mean.__globals__') + b'\x93',
    text('torch') + text('_utils.os.system') + b'\x93' + text('echo > canary') + b'\x85R',
    text('collections') + text('OrderedDict.__init__.__globals__') + b'\x93',
    # state on classes, functions and calls: attributes, slots, dictionaries
    b'ccollections\nOrderedDict\n}' + text('fromkeys') + b'Nsb',
    b'ccollections\nOrderedDict\nN}' + text('fromkeys') + b'Ns\x86b',
    b'cmmengine.logging.history_buffer\nHistoryBuffer\nN}' + text('mean') + b'cos\nsystem\ns\x86b',
    b'cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81N}' + text('__class__') + b'Ns\x86b',
    b'cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81}' + text('statistics_methods') + b'}'
    + text('mean') + b'cos\nsystem\nssb',
    b'cmmengine.optim.scheduler.param_scheduler\nOneCycleParamScheduler._annealing_cos\n'
    b'N}' + text('__code__') + b'Ns\x86b',
    b'ctorch\nTensor\nN}' + text('__add__') + b'Ns\x86b',
    raw_tensor() + b'N}' + text('data') + b'Ns\x86b',
    raw_tensor() + b'}' + text('__class__') + b'Nsb',
    # items for a class
    b'ccollections\nOrderedDict\n(' + text('a') + b'Nu',
    b'cos\nenviron\n' + text('EVIL') + text('1') + b's',
    b'csys\npath\n(' + text('/evil') + b'e',
    # arrays
    call('numpy._core.multiarray', '_reconstruct', b'cnumpy\nmemmap\n', b'K\x00\x85', text('b')),
    call('numpy._core.multiarray', '_reconstruct', b'cnumpy\nndarray\n', b'J\xff\xff\xff\x7f\x85',
         text('O')),
    call('numpy._core.multiarray', '_reconstruct', b'cnumpy\nndarray\n', b'K\x00\x85', text('b'))
    + b'(K\x01K\x02\x85' + call('numpy', 'dtype', text('O8'), b'\x89', b'\x88') + b'\x89C\x10'
    + b'A' * 16 + b'tb',
    call('numpy._core.multiarray', 'scalar', call('numpy', 'dtype', text('O8'), b'\x89', b'\x88'),
         b'C\x08AAAAAAAA'),
    call('numpy', 'dtype', text('f8'), b'\x89', b'\x88')
    + b'(K\x03' + text('>') + b'NN}' + text('a') + b'NsJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb',
    call('numpy', 'dtype', text('f8')) + b'(K\x03' + text('<') + b'NNNK\x7fK\x7fK\x00tb',
    call('numpy', 'dtype', text('f4,O')),
    call('numpy', 'load', text('/etc/hostname')),
    call('numpy._core.numeric', '_frombuffer', b'C\x08AAAAAAAA', call('numpy', 'dtype', text('O8')),
         b'K\x01\x85', text('C')),
    # tensors by other functions
    call('torch._tensor', '_rebuild_from_type_v2', b'cos\nsystem\n', b'N',
         text('echo > canary') + b'\x85', b'N'),
    call('torch._tensor', '_rebuild_from_type_v2', b'ctorch._tensor\n_rebuild_from_type_v2\n',
         b'N', b')', b'N'),
    call('torch', 'Tensor', b'J\xff\xff\xff\x7f'),
    call('torch.storage', '_load_from_bytes', b'C\x01a'),
    call('torch', 'UntypedStorage', b'J\xff\xff\xff\x7f'),
    call('collections', 'defaultdict', b'cos\nsystem\n') + text('a') + b'Ns',
    b'(' + text('module') + b'cos\nsystem\n' + text('/etc/hostname') + text('x') + b'tQ',
    b'(' + call('os', 'system', text('echo > canary')) + b'tQ',
    b'(' + text('storage') + call('os', 'system', text('echo > canary')) + text('0') + text('cpu')
    + b'K\x04tQ',
]  # fmt: skip


@pytest.mark.parametrize('attack', ATTACKS, ids=range(len(ATTACKS)))
def test_attacks_by_hand(attack, tmp_path, monkeypatch):
    (tmp_path / 'evil_module.py').write_text("open('canary', 'w')\ndef run(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = in_dict(evil=attack, w=raw_tensor())
    records = {'data/0': np.arange(4, dtype='f4').tobytes()}
    for content in (data, data[:-2] + text('end') + attack + b'u.'):
        try:
            loaded = safe_load(archive(content, records))
        except CheckpointError:
            continue
        assert loaded['w'].tolist() == [0, 1, 2, 3]
        assert not callable(loaded['evil']) or loaded['evil'].__name__ == '_annealing_cos'


def test_extension_registry():
    import copyreg

    copyreg.add_extension('os', 'system', 240)
    try:
        data = in_dict(evil=b'\x82\xf0' + text('echo > canary') + b'\x85R')
        with pytest.raises(CheckpointError):
            safe_load(archive(data))
    finally:
        copyreg.remove_extension('os', 'system', 240)


def test_only_known_globals_become_functions():
    """The whole list of what a name in a file can turn into, apart from dtypes."""
    import pkgutil

    methods = ('load', 'run', '_annealing_cos')
    names = {f'{m.name}.{method}' for m in pkgutil.iter_modules() for method in methods}
    names |= {f'builtins.{name}' for name in dir(__builtins__)} | set(module._CALLS)
    names |= {'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler.__init__'}
    assert all(type(module._find(name)) is Placeholder for name in names)


def test_pipes(tmp_path):
    """Would be waited for: load_from of a config, or an epoch_1.pth in the work folder."""
    os.mkfifo(tmp_path / 'pipe.pth')
    with pytest.raises(CheckpointError, match=r'pipe\.pth: it is a pipe or a device; give a file'):
        safe_load(tmp_path / 'pipe.pth')
    for error, name in ((IsADirectoryError, '.'), (FileNotFoundError, 'none.pth')):
        with pytest.raises(error):
            safe_load(tmp_path / name)
