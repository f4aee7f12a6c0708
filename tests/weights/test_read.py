"""The reader reads the checkpoints of authors and hosts, and runs nothing in a file."""

import argparse
import copy
import os
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import MultiStepLR, OneCycleLR
from torch import serialization

from mmbiformer.errors import CheckpointError
from mmbiformer.weights.read import StandIn, read_checkpoint

RAN = []


def run(*args):
    """Leaves a mark; no file may have it called."""
    RAN.append(args)


@pytest.fixture(autouse=True)
def nothing_happened(tmp_path, monkeypatch):
    """No code ran, nothing was imported, and no class was changed by what a test reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'beside_the_file.py').write_text("open('canary', 'w').close()\n")
    HistoryBuffer()  # registers its methods
    classes = (HistoryBuffer, StandIn, OrderedDict, argparse.Namespace, torch.Tensor)

    def look():
        found = [dict(vars(each)) for each in classes] + [dict(HistoryBuffer._statistics_methods)]
        for each in found:
            each.pop('__slotnames__', None)  # written by pickling
        return found, set(serialization.get_safe_globals())

    before = look()
    RAN.clear()
    yield
    assert not RAN
    assert not Path('canary').exists() and 'beside_the_file' not in sys.modules
    assert look() == before


@pytest.fixture(params=['zipped', 'legacy'])
def save(request, tmp_path):
    """Saves a value as a file of torch.save; MMDetection's publish_model.py writes legacy files."""

    def save(value):
        path = tmp_path / 'x.pth'
        torch.save(value, path, _use_new_zipfile_serialization=request.param == 'zipped')
        RAN.clear()
        return path

    return save


def rewrite(path, change, name='data.pkl'):
    """Change a member of a zip file, with a checksum that fits."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for member, data in content.items():
            archive.writestr(member, change(data) if member.endswith(name) else data)


# ---- What is read.


def test_tensors(save):
    dtypes = 'float32 float64 float16 bfloat16 complex64 int64 int32 int8 uint8 bool'
    tensors = {
        name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in dtypes.split()
    }
    base = torch.randn(4, 6)
    tensors.update(
        base=base,
        view=base[1:3, ::2],
        transposed=base.t(),
        expanded=torch.ones(1).expand(10, 10),
        scalar=torch.tensor(3.0),
        empty=torch.empty(0, 3),
        leaf=torch.ones(2, requires_grad=True),
        weight=torch.nn.Parameter(torch.ones(2)),
        frozen=torch.nn.Parameter(torch.ones(2), requires_grad=False),
    )
    loaded = read_checkpoint(save(tensors))
    assert [*loaded] == [*tensors]
    for name, tensor in tensors.items():
        found = loaded[name]
        assert torch.equal(found, tensor) and type(found) is type(tensor), name
        assert (found.dtype, found.stride()) == (tensor.dtype, tensor.stride())
        assert found.requires_grad == tensor.requires_grad
    loaded['base'][1, 0] = 7
    assert loaded['view'][0, 0] == 7 and loaded['transposed'][0, 1] == 7


def test_plain_data(save):
    data = {
        'plain': [None, True, 3, -(2**70), 2.5, 'text é', b'', b'bytes\xff', bytearray(b'x'), 1j],
        'nested': ({1, 2}, (), [[]], {'a': {'b': (1,)}}),
        'torch': (torch.Size([1, 2]), torch.device('cuda', 0), torch.bfloat16),
        'milestones': Counter([3, 3, 5]),
        'ordered': OrderedDict(b=1, a=2),
        (1, 'key'): 2,
    }
    assert repr(read_checkpoint(save(data))) == repr(data)
    groups = read_checkpoint(save(defaultdict(list, a=[1])))
    assert type(groups) is dict and groups == {'a': [1]}


@pytest.mark.parametrize('core', ['numpy._core', 'numpy.core'])
def test_numpy(core, save):
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
    path = save({'arrays': arrays, 'again': arrays[0], 'scalars': scalars})
    if zipfile.is_zipfile(path):  # NumPy 1, which the originals were used with, has other names
        rewrite(path, lambda data: data.replace(b'numpy._core', core.encode()))
    loaded = read_checkpoint(path)
    for found, array in zip(loaded['arrays'], arrays, strict=True):
        assert isinstance(found, np.ndarray) and found.dtype == array.dtype.newbyteorder('=')
        assert np.array_equal(found, array) and found.flags.writeable
        assert type(pickle.loads(pickle.dumps(found))) is np.ndarray
    assert loaded['again'] is loaded['arrays'][0]
    assert loaded['scalars'] == scalars
    assert [type(item) for item in loaded['scalars']] == [type(item) for item in scalars]


def test_other_numpy_objects_are_not_read(save):
    """Their content would be pickled objects, or is laid out by the file."""
    data = [
        np.array([None, 'a'], dtype=object),
        np.array([(1, 2.0)], dtype=[('a', 'i4'), ('b', 'f8')]),
        np.array(['2020-01-01'], dtype='M8[D]'),
    ]
    assert [len(array) for array in read_checkpoint(save(data))] == [0, 0, 0]
    assert type(read_checkpoint(save([np.datetime64('2020-01-01')]))[0]) is StandIn


@pytest.fixture
def runner_state():
    """As MMEngine's Runner saves it, of either distribution."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    schedulers = [
        MultiStepLR(optimizer, milestones=[2, 4]),
        OneCycleLR(torch.optim.SGD(model.parameters(), lr=0.1), eta_max=1.0, total_steps=10),
    ]
    hub = MessageHub('test_read')
    hub.update_scalar('train/loss', 0.5)
    hub.update_scalar('train/loss', 1.5)
    hub.update_info('iter', 7)
    for name in ('train/lr', 'val/none'):
        hub.update_scalar(name, 1)  # which marks them as to be saved
    hub.log_scalars['train/lr'] = HistoryBuffer([1, 2, 3], [1, 1, 2], max_length=50)
    hub.log_scalars['val/none'] = HistoryBuffer()
    state = {
        'meta': {'cfg': 'a = 1', 'dataset_meta': {'classes': ('a', 'b'), 'palette': [(1, 2, 3)]}},
        'state_dict': model.state_dict(),
        'message_hub': hub.state_dict(),
        'optimizer': optimizer.state_dict(),
        'param_schedulers': [each.state_dict() for each in schedulers],
    }
    return state, model, optimizer, schedulers


def test_runner_checkpoint(save, runner_state):
    """A run goes on from it."""
    state, model, optimizer, schedulers = runner_state
    loaded = read_checkpoint(save(state))
    assert loaded['meta'] == state['meta']
    assert loaded['state_dict']._metadata == state['state_dict']._metadata
    model.load_state_dict(loaded['state_dict'])
    optimizer.load_state_dict(loaded['optimizer'])
    assert str(optimizer.state_dict()) == str(state['optimizer'])
    for scheduler, found in zip(schedulers, loaded['param_schedulers'], strict=True):
        assert found == scheduler.state_dict()
        scheduler.load_state_dict(found)
        scheduler.optimizer.step()
        scheduler.step()
    hub = MessageHub('test_read_resumed')
    hub.load_state_dict(loaded['message_hub'])
    losses, rates = hub.get_scalar('train/loss'), hub.get_scalar('train/lr')
    assert type(losses) is HistoryBuffer and losses.max_length == 1000000
    assert (losses.mean(), losses.statistics('min'), losses.current()) == (1.0, 0.5, 1.5)
    losses.update(4.0)
    assert losses.statistics('mean') == 2.0
    assert rates.max_length == 50
    assert [part.tolist() for part in rates.data] == [[1, 2, 3], [1, 1, 2]]
    assert [part.tolist() for part in hub.get_scalar('val/none').data] == [[], []]
    again = read_checkpoint(save(loaded))['message_hub']['log_scalars']
    assert again['train/lr'].data[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    'state', [{'_log_history': np.ones(3)}, {'max_length': 'x'}, {'_count_history': [run, run]}]
)
def test_training_log_is_checked(state, save):
    buffer = HistoryBuffer([1, 2], [1, 1])
    buffer.__dict__.update(state)
    with pytest.raises(CheckpointError, match='its training log is damaged'):
        read_checkpoint(save({'log': buffer}))


def test_training_log_brings_no_functions(save, monkeypatch):
    """MMEngine's own ``__setstate__`` would register them for all logs."""
    methods = {**HistoryBuffer._statistics_methods, 'mean': run, 'other': run}
    with monkeypatch.context() as patch:
        patch.setattr(HistoryBuffer, '_statistics_methods', methods)
        path = save({'log': HistoryBuffer([1, 3], [1, 1])})
    assert read_checkpoint(path)['log'].statistics('mean') == 2


class Node:
    """As omegaconf: children know their parents, the state is a dict."""

    def __init__(self, parent, content):
        self._parent, self._content = parent, content

    def __setstate__(self, state):
        run('setstate')


class Slotted:
    __slots__ = ('value',)

    def __init__(self, value):
        self.value = value


class DictLike(dict):
    """As yacs: a dict with attributes."""

    def __init__(self, **items):
        super().__init__(**items)
        self.frozen = True

    def __setitem__(self, key, value):
        run('setitem')


def test_what_else_a_file_names(save):
    """Beside the authors' weights are a Namespace or a config; each becomes inert."""
    weight = torch.randn(2, 2)
    root = Node(None, {})
    root._content['lr'] = Node(root, 0.1)
    data = {
        'args': argparse.Namespace(lr=0.1, output=Path('x'), weight=weight),
        'config': root,
        'yacs': DictLike(a=DictLike(b=1)),
        'slots': Slotted(weight),
        'class': Slotted,
        'function': run,
        'range': range(3),
        'model': {'weight': weight},
    }
    loaded = read_checkpoint(save(data))
    assert torch.equal(loaded.pop('model')['weight'], weight)
    stand_in = loaded.pop('class'), loaded.pop('function')
    assert stand_in == (StandIn, StandIn)
    for found in loaded.values():
        assert type(found) is StandIn and not hasattr(found, '__dict__')
        assert type(copy.deepcopy(found)) is type(pickle.loads(pickle.dumps(found))) is StandIn
    with pytest.raises(CheckpointError, match=r'it holds a pickled object \(.*, not weights'):
        read_checkpoint(save(argparse.Namespace(model=weight)))


@pytest.mark.parametrize(
    'location', [None, 'cpu', torch.device('cpu'), {'cuda:7': 'cpu'}, lambda *args: None, 'meta']
)
def test_map_location(location, save):
    tensor = torch.randn(3, 2).t()
    found = read_checkpoint(save([tensor]), location)[0]
    assert found.device.type == ('meta' if location == 'meta' else 'cpu')
    assert found.is_meta or torch.equal(found, tensor)


def test_mapped_into_memory(save):
    path = save({'a': torch.arange(6.0), 'args': argparse.Namespace(lr=1)})
    found = read_checkpoint(path, mmap=True)
    assert found['a'].tolist() == [0, 1, 2, 3, 4, 5] and type(found['args']) is StandIn


@pytest.mark.parametrize('device', ['cpu', None, torch.device('cpu')])
def test_safetensors(device):
    tensors = {
        'matrix': torch.randn(2, 3),
        'number': torch.tensor(3),
        'half': torch.ones(2, dtype=torch.bfloat16),
        'empty': torch.ones(0, 4),
    }
    safetensors.torch.save_file(tensors, 'x.safetensors', dict(format='pt'))
    os.rename('x.safetensors', 'x.pth')  # the content tells, not the name
    found = read_checkpoint('x.pth', device)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


# ---- What is refused.


@pytest.mark.parametrize('format', ['zipped', 'legacy', 'safetensors'])
@pytest.mark.parametrize('keep', [0, 0.01, 0.3, 0.9, 0.999])
def test_truncated(format, keep, tmp_path):
    path, tensors = tmp_path / 'x.pth', {f'a{i}': torch.randn(100) for i in range(5)}
    if format == 'safetensors':
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=format == 'zipped')
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r'x\.pth cannot be read: .*(truncated|damaged)') as e:
        read_checkpoint(path)
    assert e.value.__cause__ is not None and len(str(e.value)) < 500


@pytest.mark.parametrize('name', ['data.pkl', 'data/0', 'data/3'])
def test_flipped_byte(name, tmp_path):
    """torch does not compare the checksums of zip files."""
    path = tmp_path / 'x.pth'
    torch.save({f'a{i}': torch.full((1000,), float(i)) for i in range(5)}, path)
    with zipfile.ZipFile(path) as archive:
        member = archive.read(f'x/{name}')
    content = path.read_bytes()
    place = content.index(member) + len(member) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(CheckpointError, match=r'x\.pth cannot be read: .*(checksum|CRC)'):
        read_checkpoint(path)


def test_without_checksums(tmp_path):
    serialization.set_crc32_options(False)
    try:
        torch.save(torch.ones(3), tmp_path / 'x.pth')
    finally:
        serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / 'x.pth').tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'<!DOCTYPE html><html>Too many requests</html>', 'it is a web page; download'),
        (b'\n<?xml version="1.0"?><Error/>', 'it is a web page'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'run git lfs pull'),
        (b'just text', 'no checkpoint'),
        (pickle.dumps([1, 2]), 'no checkpoint'),
        (pickle.dumps(b'\x1b[2J\n'), 'no checkpoint'),
    ],
)
def test_other_files(content, message, tmp_path):
    (tmp_path / 'x.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=rf'x\.pth cannot be read: .*{message}') as info:
        read_checkpoint(tmp_path / 'x.pth')
    assert str(info.value).isprintable()


def test_zip_around_a_checkpoint(tmp_path):
    """BiXT's files are published so."""
    torch.save([1], 'model_best.pth.tar')
    with zipfile.ZipFile('x.zip', 'w') as archive:
        archive.write('model_best.pth.tar')
    with pytest.raises(CheckpointError, match=r'x\.zip .*zip file without data\.pkl; unpack it'):
        read_checkpoint('x.zip')
    assert read_checkpoint('model_best.pth.tar') == [1]


def test_missing_file():
    with pytest.raises(FileNotFoundError):
        read_checkpoint('none.pth')


# ---- Files that ask for code. The fixture above checks that none ran.


class Asks:
    """Is pickled as a call, and a state for what it gives."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Only what can be called is pickled as what is called."""


ASKS = {
    'own function': lambda: Asks(run, 1),
    'mkdir': lambda: Asks(os.mkdir, 'canary'),
    'open': lambda: Asks(open, 'canary', 'w'),
    'exec': lambda: Asks(exec, "open('canary', 'w')"),
    'getattr': lambda: Asks(getattr, Node, '__init__'),
    'getattr of a known class': lambda: Asks(getattr, HistoryBuffer, '__init__'),
    'state': lambda: Asks(Node, None, state={'a': Asks(run, 2)}),
    'a call of a call': lambda: Asks(Asks(getattr, Node, '__init__'), Asks(run, 3)),
    'a checkpoint inside': lambda: Asks(pickle.loads, pickle.dumps(Asks(run, 4))),
}
PLACES = {
    'value': lambda asks: {'x': asks},
    'list': lambda asks: {'x': [asks, (asks,)]},
    'namespace': lambda asks: {'x': argparse.Namespace(a=asks, b={'c': asks})},
    'key': lambda asks: {'x': {asks: 1}},
    'set': lambda asks: {'x': {asks}},
    'argument': lambda asks: {'x': Asks(argparse.Namespace, asks)},
    'ordered': lambda asks: {'x': OrderedDict(a=asks)},
    'array': lambda asks: {'x': np.array([asks, asks], dtype=object)},
    'alone': lambda asks: asks,
}


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('asks', ASKS)
def test_calls(asks, place, save):
    """The weights are read, or the file is refused."""
    weights = torch.arange(3)
    found = PLACES[place](ASKS[asks]())
    path = save({'w': weights, **found} if isinstance(found, dict) else found)
    try:
        loaded = read_checkpoint(path)
    except CheckpointError:
        assert place == 'alone' or asks in ('mkdir', 'open')
    else:
        assert torch.equal(loaded['w'], weights)


def test_names_in_attributes(save):
    """A state dict and a tensor can have attributes."""
    state = OrderedDict(w=torch.ones(2))
    state._metadata = OrderedDict(a=Asks(run, 1))
    state.extra = Asks(run, 2)
    assert torch.equal(read_checkpoint(save(state))['w'], torch.ones(2))
    tensor = torch.ones(2)
    tensor.hook = Asks(run, 3)
    assert read_checkpoint(save([tensor]))[0].tolist() == [1, 1]


def test_module_beside_the_file(save):
    path = save({'x': Slotted(1), 'w': torch.ones(2)})
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        rewrite(path, lambda data: data.replace(__name__.encode(), b'beside_the_file'))
    else:
        path.write_bytes(content.replace(__name__.encode(), b'beside_the_file'))
    assert type(read_checkpoint(path)['x']) is StandIn


@pytest.mark.parametrize('allowed', [run, Node, getattr])
def test_names_that_the_process_has_allowed(allowed, save):
    """Other code may have allowed them for its own files; they are not used here."""
    path = save({'x': Asks(run, 1), 'y': Node(None, {}), 'z': Asks(getattr, Node, '__name__')})
    with serialization.safe_globals([allowed]):
        before = set(serialization.get_safe_globals())
        loaded = read_checkpoint(path)
        assert type(loaded['x']) is type(loaded['y']) is loaded['z'] is StandIn
        assert set(serialization.get_safe_globals()) == before
