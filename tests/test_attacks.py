"""Checkpoints from strangers, attacked where tests/test_safe_load.py left off.

Random damage to every format, and files that are small but ask for hours or for all memory.
"""

import contextlib
import copy
import io
import itertools
import random
import resource
import struct
import subprocess
import sys
import time
import traceback
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from test_checkpoint import official
from test_safe_load import archive, call, in_dict, raw_tensor, saved, storage, text

from mmbiformer import safe_load as module
from mmbiformer.checkpoint import load_from_local, register_safe_loader
from mmbiformer.models import BiFormer
from mmbiformer.safe_load import CheckpointError, safe_load

CONTENT = dict(
    state_dict={'a': torch.arange(6.0).reshape(2, 3), 'b': torch.ones(3, dtype=torch.int64)},
    meta=dict(epoch=3, text='some text', array=np.arange(3)),
    optimizer=dict(state={0: dict(step=torch.tensor(1.0))}, param_groups=[dict(lr=0.1)]),
)
SOURCES = {
    'zip': saved(CONTENT).getvalue(),
    'zip, protocol 4': saved(CONTENT, protocol=4).getvalue(),
    'legacy': saved(CONTENT, zip_format=False).getvalue(),
    'safetensors': safetensors.torch.save(CONTENT['state_dict']),
}
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.one_of(st.integers(0, 255), st.binary())),
    min_size=1,
    max_size=8,
)


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(st.sampled_from([*SOURCES]), EDITS, st.floats(0, 1))
def test_damaged_anywhere(source, edits, keep):
    """Bytes changed, put in and cut off: a result or a CheckpointError, at once."""
    content = bytearray(SOURCES[source])
    for place, change in edits:
        at = int(place * len(content))
        if isinstance(change, int):
            content[at] = change
        else:
            content[at:at] = change
    if keep < 0.3:
        del content[int(keep / 0.3 * len(content)) :]
    began = time.perf_counter()
    with contextlib.suppress(CheckpointError):
        safe_load(io.BytesIO(bytes(content)))
    assert time.perf_counter() - began < 5


def bad_array():
    """An array whose state does not fit: it becomes a placeholder, wherever the memo has it."""
    reconstruct = call(
        'numpy._core.multiarray', '_reconstruct', b'cnumpy\nndarray\n', b'K\x00\x85', text('b')
    )
    return reconstruct + b'(K\x01K\x02\x85NNNtb0'


BOMBS = {
    # n memo entries, gone through n times
    'memo': lambda: in_dict(x=b''.join(b'Nr' + i.to_bytes(4, 'little') + b'0' for i in range(2**17))
                            + bad_array() * 2**13 + b'N'),
    'keys': lambda: in_dict(x=b')' + b'2\x86' * 90 + b'q\x000}' + b'h\x00Ns' * 2**18),
    'depth': lambda: in_dict(x=b')' + b'\x85' * 2**21),
    'lists in lists': lambda: in_dict(x=b']' + b'2a' * 2**18),
    'twice as many': lambda: in_dict(x=b']' + b'2\x86' * 2**18),
    'long integer': lambda: in_dict(x=b'\x8b' + (2**23).to_bytes(4, 'little') + b'\x7f' * 2**23),
    'long name': lambda: in_dict(x=b'c' + b'a' * 2**22 + b'\nb\n' + b'0cos\nsystem\n'),
    'storages': lambda: in_dict(
        x=b'(' + b''.join(raw_tensor(content=storage()) for _ in range(2**12)) + b't'
    ),
    'expanded': lambda: in_dict(
        x=raw_tensor(size=b'J\x00\x00\x00\x7f\x85', stride=b'K\x00\x85')
    ),
}  # fmt: skip
READ = """
import sys
from mmbiformer.safe_load import CheckpointError, safe_load
try:
    safe_load(sys.argv[1])
except CheckpointError as error:
    print(str(error)[:300])
else:
    print('read')
"""


@pytest.mark.parametrize('bomb', BOMBS)
def test_bombs(bomb, tmp_path):
    """In a process with limits on time and memory: over in seconds, and no crash."""
    path = tmp_path / 'bomb.pth'
    path.write_bytes(archive(BOMBS[bomb](), {'data/0': bytes(16)}).getvalue())

    def restrict():
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))

    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', READ, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=restrict,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def number(value):
    return b'\x8a\x09' + value.to_bytes(9, 'little', signed=True)


def decimal(value):
    return b'G' + struct.pack('>d', value)


MANY = 2**13
SIGNS = [*itertools.product([number(-1), number(-2)], repeat=13)]
ALIKE = {
    'integers': [number(i * 2**32) for i in range(1, MANY)],
    'small integers': [number(i * 2**17) for i in range(1, MANY)],
    'decimals': [decimal(i * 2.0**61) for i in range(MANY)],
    'complex numbers': [
        call('builtins', 'complex', decimal(-1000003.0 * i), decimal(i)) for i in range(MANY)
    ],
    'tuples': [b'(' + b''.join(signs) + b't' for signs in SIGNS],
    'sets': [b'(' + b''.join(signs) + decimal(i) + b'\x91' for i, signs in enumerate(SIGNS)],
    'nested tuples': [b')' + b'\x85' * (1 + i % 40) for i in range(MANY)],
}
"""Kinds of keys of which many with the same hash, or probes, can be found; not all of these are."""
HOLDERS = {
    'dict': lambda keys: b'}(' + b''.join(key + b'N' for key in keys) + b'u',
    'dict by items': lambda keys: b'}' + b''.join(key + b'Ns' for key in keys),
    'dict from a mark': lambda keys: b'(' + b''.join(key + b'N' for key in keys) + b'd',
    'set': lambda keys: b'\x8f(' + b''.join(keys) + b'\x90',
    'frozenset': lambda keys: b'(' + b''.join(keys) + b'\x91',
    'called set': lambda keys: call('builtins', 'set', b'](' + b''.join(keys) + b'e'),
    'OrderedDict': lambda keys: call(
        'collections', 'OrderedDict', b'](' + b''.join(key + b'N\x86' for key in keys) + b'e'
    ),
}


@pytest.mark.parametrize(
    ('keys', 'holder'),
    [(keys, 'dict') for keys in ALIKE] + [('integers', holder) for holder in [*HOLDERS][1:]],
)
def test_keys_with_the_same_hash(keys, holder):
    """Each is compared with all before it: a file of a few MB would take hours."""
    content = HOLDERS[holder](ALIKE[keys])
    with pytest.raises(CheckpointError, match=r'more than 6000 numbers .* Use text'):
        safe_load(archive(in_dict(x=content)))
    safe_load(archive(in_dict(x=HOLDERS[holder](ALIKE[keys][:40]))))


def test_copies_of_keys_with_the_same_hash():
    """Also where they are not in the file again."""
    content = HOLDERS['dict'](ALIKE['integers'][:1000]) + b'q\x000'
    copies = b'(' + call('collections', 'Counter', b'h\x00') * 600 + b't'
    with pytest.raises(CheckpointError, match='more than 6000 numbers'):
        safe_load(archive(in_dict(x=content + copies)))


def test_long_keys():
    """What is long and short in the file, since it stands there once, is hashed every time."""
    long = b'\x8a\x09' + (2**63).to_bytes(9, 'little')
    for key in (long, long + b'\x85', b'(' + long + b'\x91', b'\x8a\xff' + b'\x80' * 255):
        with pytest.raises(CheckpointError, match=r'an integer of \d+ bits in a dictionary key'):
            safe_load(archive(in_dict(x=b'}' + key + b'Ns')))
    # Two texts that are equal but not the same have to be compared.
    twice = (text('x' * 10**5) + b'q\x000') + (text('x' * 10**5) + b'q\x010')
    keys = b'}h\x00Ns' + b'h\x01Ns' * 2000
    with pytest.raises(CheckpointError, match='again and again'):
        safe_load(archive(in_dict(x=twice + keys)))


def test_memo_entries_with_the_same_hash():
    for put in (b'Np%d\n' % (2**61 - 1), b'Np-1\n', b'Nr\xff\xff\xff\xff'):
        with pytest.raises(CheckpointError, match='memo entry'):
            safe_load(archive(in_dict(x=put)))
    assert safe_load(archive(in_dict(x=b'Np7\n0Nr\x08\x00\x00\x000g7\n'))) == dict(x=None)


def test_usual_keys():
    content = dict(
        optimizer={i: i for i in range(100000)},
        frozen={i: i for i in range(2000, 3000)},  # parameters that have no state before
        gaps={i: i for i in range(20000) if i % 4},
        ids={i * 1000003 for i in range(2000)},  # of images, say
        names={f'name {i}': i for i in range(5000)},
        pairs={('text', str(i)): i for i in range(3000)},
        numbers={i / 8: i for i in range(500)},
        places={(i, -i): i for i in range(300)},
        others={None: 1, True: 2, b'bytes': 3, 2**60: 4},
    )
    for protocol in (2, 4):
        assert safe_load(saved(content, protocol=protocol)) == content


def test_a_key_after_many_with_its_hash():
    """It is compared with all of them, every time: 2 bytes for 0.1 ms."""
    keys = ALIKE['complex numbers'][1:5000]
    content = b'}(' + b''.join(key + b'N' for key in keys) + b'u(' + b'K\x00N' * 2**18 + b'u'
    began = time.process_time()
    with pytest.raises(CheckpointError, match='more memory or time'):
        safe_load(archive(in_dict(x=content)))
    assert time.process_time() - began < 10


def global_(name, index):
    """Names a class or function, and keeps it in the memo."""
    module_name, _, name = name.rpartition('.')
    return f'c{module_name}\n{name}\n'.encode() + b'q' + bytes([index]) + b'0'


def tensor(dims=1, grad=b'\x89'):
    """The function that rebuilds tensors, and its arguments, in the memo."""
    ones = b'(' + b'K\x01' * dims + b't'
    return global_('torch._utils._rebuild_tensor_v2', 1) + (
        b'(' + storage() + b'K\x00' + ones + ones + grad + b'Ntq\x020'
    )


NAMES = b''.join(text(str(i)) for i in range(1000))
ARRAY = b'(cnumpy\nndarray\nK\x00\x85' + text('b') + b'tq\x020'
DOUBLE = call('numpy', 'dtype', text('f8'))
HUNGRY = {  # what is made again and again, and what is in the memo before
    'sets': (b'\x8f', b''),
    'lists': (b']', b''),
    'dicts': (b'}', b''),
    'frozensets': (b'(\x91', b''),
    'tuples': (b'N\x85', b''),
    'marks': (b'(N', b''),
    'dicts of one': (b'}h\x01Ns', text('ab') + b'q\x010'),
    'sets of one': (b'\x8f(h\x01\x90', text('ab') + b'q\x010'),
    'sets of numbers': (b'\x8f(' + b''.join(b'K' + bytes([i]) for i in range(160)) + b'\x90', b''),
    'memo': (b'N\x85\x94', b''),
    'names': (b'h\x01h\x01\x93', text('\U0001f600' * 100) + b'q\x010'),
    'methods': (
        b'h\x01h\x02h\x03\x86R',
        global_('builtins.getattr', 1) + global_('a.b', 2) + text('\U0001f600' * 240) + b'q\x030',
    ),
    'placeholders': (b'h\x01)R', global_('os.system', 1)),
    'OrderedDicts': (b'h\x01)R', global_('collections.OrderedDict', 1)),
    'histories': (b'h\x01)R', global_('mmengine.logging.history_buffer.HistoryBuffer', 1)),
    'copies of sets': (
        b'h\x01h\x02\x85R', global_('builtins.set', 1) + b'(' + NAMES + b'tq\x020'
    ),
    'copies of counters': (
        b'h\x01h\x02\x85R',
        global_('collections.Counter', 1) + b'}(' + NAMES + b'uq\x020',
    ),
    'copies of text': (
        b'h\x01h\x02R',
        global_('_codecs.encode', 1) + text('x' * 5000) + text('latin1') + b'\x86q\x020',
    ),
    'versions': (
        b'h\x01)Rh\x02b',
        global_('collections.OrderedDict', 1) + b'}' + text('_metadata') + b'}'
        + b''.join(text(str(i)) + b'}' + text('version') + b'K\x01ss' for i in range(200))
        + b'sq\x020',
    ),
    'arrays': (
        b'h\x01h\x02Rh\x03b',
        global_('numpy._core.multiarray._reconstruct', 1) + ARRAY
        + b'(K\x01K\x64\x85' + DOUBLE + b'\x89B' + struct.pack('<I', 800) + bytes(800) + b'tq\x030',
    ),
    'storages': (b'h\x01Q', storage()[:-1] + b'q\x010'),
    'tensors': (b'h\x01h\x02R', tensor(grad=b'\x88')),
    'tensors of many dimensions': (b'h\x01h\x02R', tensor(64)),
    'parameters': (
        b'h\x03h\x04\x88\x86R',
        tensor() + global_('torch._utils._rebuild_parameter', 3) + b'h\x01h\x02Rq\x040',
    ),
}  # fmt: skip
MEASURE = """
import resource, sys, time
from mmbiformer.safe_load import CheckpointError, safe_load
import mmengine.logging
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    try:
        safe_load(path)
    except CheckpointError as error:
        assert 'far more memory or time than' in str(error), error
        said = 'refused'
    else:
        said = 'read'
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(said, (after - before) * 1024, time.process_time() - began)
"""


@pytest.mark.parametrize('kind', HUNGRY)
def test_small_files_that_ask_for_much(kind, monkeypatch):
    """Each kind of object is paid for. Memory that Python knows of is measured."""
    unit, before = HUNGRY[kind]
    monkeypatch.setattr(module, 'BASE', 0)
    content = in_dict(x=before + b'(' + unit * (2**16 // len(unit)) + b't')
    file = archive(content, {'data/0': bytes(16)})
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError):
            safe_load(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(content) + 2**18
    if kind != 'marks':  # a little less than what is paid for
        with pytest.raises(CheckpointError, match='far more memory or time than'):
            safe_load(file.seek(0) or file)


def test_memory_of_the_process(tmp_path):
    """As the system sees it, with what torch and numpy allocate: 100 MB and 40 times the file."""
    paths = [tmp_path / str(index) for index in range(3)]
    for path, kind in zip(paths, ('copies of sets', 'tensors', 'sets'), strict=True):
        unit, before = HUNGRY[kind]
        content = in_dict(x=before + b'(' + unit * (2**20 // len(unit)) + b't')
        path.write_bytes(archive(content, {'data/0': bytes(16)}).getvalue())
    command = [sys.executable, '-W', 'ignore', '-c', MEASURE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.split('\n')[:3]:
        said, memory, seconds = line.split()
        assert said == 'refused' and int(memory) < 100e6 + 40 * 2**20 and float(seconds) < 20


def test_pickles_of_a_legacy_file_have_one_budget(monkeypatch):
    monkeypatch.setattr(module, 'BASE', 0)
    head = saved(None, False).getvalue()
    head = head[: head.index(b'\x80\x02N.')]
    content = b'\x80\x02(' + b'\x8f' * 1000 + b't.'
    padding = bytes(25000)  # 16 times the file is enough for one, but not for two
    with pytest.raises(CheckpointError, match='list of its storages'):
        safe_load(io.BytesIO(head + content + b'\x80\x02N.' + padding))
    with pytest.raises(CheckpointError, match='far more memory or time than'):
        safe_load(io.BytesIO(head + content + content + padding))


def test_tensors_are_not_gone_through():
    """Going through one makes a tensor of each of its 2**24 numbers."""
    expanded = raw_tensor(size=b'J' + struct.pack('<I', 2**24) + b'\x85', stride=b'K\x00\x85')
    reconstruct = call(
        'numpy._core.multiarray', '_reconstruct', b'cnumpy\nndarray\n', b'K\x00\x85', text('b')
    )
    for content, message in [
        (call('collections', 'OrderedDict', b']' + expanded + b'a'), 'content of an OrderedDict'),
        (reconstruct + expanded + b'b', 'bad state of an array'),
        (DOUBLE + expanded + b'b', 'bad state of a numpy.dtype'),
    ]:
        with pytest.raises(CheckpointError, match=message):
            safe_load(archive(in_dict(x=content), {'data/0': bytes(16)}))


def usual_checkpoint():
    """More than most: many small parameters, each with its group and a copy, and their history."""
    net = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2)) for _ in range(1000)])
    optimizer = torch.optim.AdamW([dict(params=[p], lr=i / 8) for i, p in enumerate(net)])
    sum(p.sum() for p in net).backward()
    optimizer.step()
    losses = {f'train/loss_{i}': HistoryBuffer(np.ones(1000), np.ones(1000)) for i in range(100)}
    return dict(
        state_dict=net.state_dict(),
        ema_state_dict=copy.deepcopy(net.state_dict()),
        optimizer=optimizer.state_dict(),
        message_hub=dict(log_scalars=losses, runtime_info=dict(iter=1), resumed_keys={}),
        meta=dict(palette=[(i % 256, 2, 3) for i in range(1000)], random=random.getstate()),
        boxes=[dict(id=i, bbox=[1.5 * i, 2.5, 3.5, 4.5], area=9.0) for i in range(3000)],
    )


@pytest.mark.parametrize('zip_format', [True, False])
def test_usual_files_ask_for_little(zip_format, monkeypatch):
    """A third of the budget that any file has is enough."""
    monkeypatch.setattr(module, 'BASE', module.BASE // 3)
    monkeypatch.setattr(module, 'FACTOR', module.FACTOR // 3)
    content = usual_checkpoint()
    found = safe_load(saved(content, zip_format))
    assert str(found['optimizer']) == str(content['optimizer'])
    assert found['boxes'] == content['boxes'] and found['meta'] == content['meta']
    assert found['ema_state_dict'].keys() == content['ema_state_dict'].keys()
    assert safe_load(saved(3, zip_format)) == 3


@pytest.mark.parametrize('content', [
    b'(' + text('storage') + text('ctorch') + text('\x1b[31m\r\n') * 3 + b'tQ',
    b'(' + text('module') + text('a') + text('\x1b[2J\n') + b'\x93tQR',
    text('a') + text('\x1b[2J\n' * 2**20) + b'\x93',
    call('torch._tensor', '_rebuild_from_type_v2', text('a') + text('\x1b\n\u202e\x93') + b'\x93',
         b'N', b')', b'N'),
    raw_tensor(content=storage(key='\x1b\n')),
    raw_tensor(content=storage(location='\x1b\n')),
    call('torch', 'device', text('\x1b\n')),
    call('torch', 'device', text('x' * 2**20)),
    b'I' + b'9' * 5000 + b'\n',
    b'L' + b'9' * 5000 + b'L\n',
    b'p' + b'9' * 5000 + b'\n',
    b'}\x8b' + struct.pack('<I', 5000) + b'\x7f' * 5000 + b'Ns',
    raw_tensor(size=b'\x8b' + struct.pack('<I', 5000) + b'\x7f' * 5000 + b'\x85'),
    raw_tensor(content=storage()[:-1] + b'0\x8b' + struct.pack('<I', 5000) + b'\x7f' * 5000 + b'Q'),
])  # fmt: skip
def test_messages_are_short_and_control_nothing(content):
    """Nor does the traceback show what they come from."""
    for file in (in_dict(x=content), b'\x80\x02' + text('a') + text('\x1b[2J\n') + b'\x93.'):
        with pytest.raises(CheckpointError) as info:
            safe_load(archive(file, {'data/0': bytes(16)}), map_location=None)
        message = str(info.value)
        assert message.isprintable() and len(message) < 1200
        assert '\x1b' not in ''.join(traceback.format_exception(info.value))


def test_names_are_short():
    name = '\x1b\n' * 100
    found = safe_load(archive(in_dict(x=text('a') + text(name) + b'\x93')))['x']
    assert found.name == 'a.' + name and repr(found).isprintable()
    with pytest.raises(
        CheckpointError, match='a class or function with a name of 10001 characters'
    ):
        safe_load(archive(in_dict(x=text('a') + text('b' * 10000) + b'\x93')))


def test_many_expanded_tensors():
    """Each may be large for its storage, but not all of them: who copies them needs it all."""
    one = torch.ones(1).expand(2**24 - 1)
    loaded = safe_load(saved([one, torch.nn.Parameter(one), torch.ones(9)[2:], one.view(1, -1)]))
    assert [x.shape.numel() for x in loaded] == [2**24 - 1, 2**24 - 1, 7, 2**24 - 1]
    for make in (torch.Tensor, torch.nn.Parameter):
        with pytest.raises(CheckpointError, match=r'expanded tensors that are \d+ bytes larger'):
            safe_load(saved([make(one) for _ in range(5)]))
    with pytest.raises(CheckpointError, match='expanded tensors'):
        safe_load(saved([torch.ones(1).expand(2**24 - 1) for _ in range(5)], False))


def test_nested_archives():
    """A checkpoint inside one, under every name that might be looked for."""
    inner = saved({'w': torch.ones(2)}).getvalue()
    for name in ('data.pkl', 'data/0', 'inner/data.pkl', 'constants.pkl', 'inner.pth'):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w') as file:
            file.writestr('archive/' + name, inner)
        buffer.seek(0)
        with pytest.raises(CheckpointError):
            safe_load(buffer)


# ---- Code as text: configs are Python.


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A checkpoint whose configs would leave a mark if they were run."""
    monkeypatch.chdir(tmp_path)
    code = "open('canary', 'w').close()\nmodel = dict(type='Linear')\n"
    meta = dict(config=code, cfg=code, epoch=1, iter=1)
    hub = dict(runtime_info=dict(cfg=code), log_scalars={}, resumed_keys={})
    torch.save(dict(meta=meta, message_hub=hub, state_dict={'a': torch.ones(1)}), 'evil.pth')
    Config.fromstring(code, file_format='.py')
    assert (tmp_path / 'canary').exists()  # this is how it would be run
    (tmp_path / 'canary').unlink()
    yield tmp_path / 'evil.pth'
    assert not (tmp_path / 'canary').exists()


def test_configs_in_checkpoints_are_not_run(evil):
    register_safe_loader()
    loaded = CheckpointLoader.load_checkpoint(str(evil), map_location='cpu')
    assert loaded['meta'] == dict(epoch=1, iter=1)
    assert loaded['message_hub']['runtime_info'] == {}


@pytest.mark.parametrize('content', [[1, 2], 3, {'state_dict': {1: torch.ones(1)}}, {(1, 2): 3}])
def test_no_weights_by_name(content, tmp_path):
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'x\.pth holds no weights by name'):
        load_from_local(str(tmp_path / 'x.pth'))


# ---- safetensors.


@pytest.mark.parametrize('map_location', [None, 'cpu', 'meta', lambda storage, location: storage])
def test_safetensors(map_location, tmp_path):
    tensors = {
        'matrix': torch.randn(2, 3),
        'number': torch.tensor(3),
        'half': torch.ones(2, dtype=torch.bfloat16),
        'empty': torch.ones(0, 4),
        'flags': torch.tensor([True, False]),
    }
    safetensors.torch.save_file(tensors, tmp_path / 'x.safetensors')
    found = safe_load(tmp_path / 'x.safetensors', map_location)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].is_meta or torch.equal(found[name], value)
    if map_location == 'cpu':
        found['flags'].resize_(100)


@pytest.mark.parametrize('length', [15392, 19280, 128, 60 + 2**8])
def test_safetensors_whose_header_length_looks_like_text(length):
    """The length comes first: b' <' as in HTML, b'PK' as in zip, b'\\x80' as in pickle, b'<'."""
    tensors = {'a': torch.arange(3.0)}
    plain = safetensors.torch.save(tensors)
    size = int.from_bytes(plain[:8], 'little')
    header = plain[8 : 8 + size].rstrip().ljust(length)
    content = length.to_bytes(8, 'little') + header + plain[8 + size :]
    assert torch.equal(safe_load(io.BytesIO(content))['a'], tensors['a'])
    with pytest.raises(CheckpointError, match=r'its safetensors header does not fit.* truncated'):
        safe_load(io.BytesIO(content[:100]))


def test_safetensors_as_backbone_weights(tmp_path):
    """Under the authors' names and under ours."""
    path = tmp_path / 'x.safetensors'
    weights = official()
    ours = BiFormer('tiny', final_norm=True)
    for state_dict in (weights, None):
        if state_dict is None:
            state_dict = {f'backbone.{k}': v for k, v in ours.state_dict().items()}
        safetensors.torch.save_file({k: v.contiguous() for k, v in state_dict.items()}, path)
        net = BiFormer(
            'tiny', final_norm=True, init_cfg=dict(type='Pretrained', checkpoint=str(path))
        )
        register_safe_loader()
        net.init_weights()
        if state_dict is weights:
            ours = net
            assert torch.equal(net.norm.weight, weights['norm.weight'])
    for a, b in zip(net.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_convert_to_safetensors_and_back(tmp_path):
    torch.save(dict(model=official()), tmp_path / 'authors.pth')
    for source, target in (('authors.pth', 'a.safetensors'), ('a.safetensors', 'b.pth')):
        command = ['tools/convert_checkpoint.py', tmp_path / source, tmp_path / target]
        subprocess.run([sys.executable, '-W', 'ignore', *map(str, command)], check=True)
    there, back = safe_load(tmp_path / 'a.safetensors'), safe_load(tmp_path / 'b.pth')['state_dict']
    assert there.keys() == back.keys() and 'backbone.norm.weight' in there
    assert all(torch.equal(there[name], back[name]) for name in there)
    assert not [*tmp_path.glob('*.partial')]
    # Safetensors has no checksums, but what the command writes has one.
    content = bytearray((tmp_path / 'a.safetensors').read_bytes())
    for place in (-1, -len(content) // 2):
        damaged = content.copy()
        damaged[place] ^= 1
        with pytest.raises(CheckpointError, match='not those that were written'):
            safe_load(io.BytesIO(damaged))


@pytest.mark.parametrize('name', ['open-mmlab://evil', 'openmmlab://evil'])
def test_names_that_mmengine_knows(name, tmp_path, monkeypatch):
    """A list in the user's folder may name a file; it is read as any other."""
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    (tmp_path / 'open_mmlab.json').write_text('{"evil": "evil.pth", "good": "good.pth"}')
    evil = archive(in_dict(x=call('os', 'mkdir', text(str(tmp_path / 'ran')))))
    (tmp_path / 'evil.pth').write_bytes(evil.getvalue())
    torch.save({'a': torch.ones(2)}, tmp_path / 'good.pth')
    register_safe_loader()
    assert 'x' in CheckpointLoader.load_checkpoint(name)  # as an inert placeholder
    assert not (tmp_path / 'ran').exists()
    good = CheckpointLoader.load_checkpoint(name.replace('evil', 'good'))
    assert torch.equal(good['a'], torch.ones(2))
    with pytest.raises(CheckpointError, match='none of the models'):
        CheckpointLoader.load_checkpoint(name.replace('evil', 'none'))


def test_no_scheme_keeps_a_loader_that_runs_code():
    register_safe_loader()
    for loader in CheckpointLoader._schemes.values():
        assert loader.__module__ == 'mmbiformer.checkpoint'
    for path in ('s3://a/b.pth', 'petrel://a/b.pth', 'cluster:s3://a/b.pth', 'pavi://a/b'):
        with pytest.raises(CheckpointError, match='download it and give the file'):
            CheckpointLoader.load_checkpoint(path)


def test_metadata_holds_versions_only():
    """Otherwise a file's tensors would replace the parameters, which the optimizer goes on with."""
    net = torch.nn.Linear(2, 2)
    state_dict = net.state_dict()
    state_dict._metadata['']['assign_to_params_buffers'] = True
    state_dict._metadata['x'] = 'text'
    found = safe_load(saved({'state_dict': state_dict}))['state_dict']
    assert dict(found._metadata) == {'': {'version': 1}}
    before = net.weight
    net.load_state_dict(found)
    assert net.weight is before
