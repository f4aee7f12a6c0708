"""Checkpoints from strangers, attacked where tests/test_safe_load.py left off.

Random damage to every format, and files that are small but ask for hours or for all memory.
"""

import contextlib
import io
import itertools
import resource
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from test_checkpoint import official
from test_safe_load import archive, call, in_dict, raw_tensor, saved, storage, text

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


MANY = 2**12
SIGNS = [*itertools.islice(itertools.product([number(-1), number(-2)], repeat=12), MANY)]
ALIKE = {
    'integers': [number(i * 2**32) for i in range(1, MANY)],
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
    with pytest.raises(CheckpointError, match=r'more than 2048 numbers .* Use text'):
        safe_load(archive(in_dict(x=content)))
    safe_load(archive(in_dict(x=HOLDERS[holder](ALIKE[keys][:40]))))


def test_copies_of_keys_with_the_same_hash():
    """Also where they are not in the file again."""
    content = HOLDERS['dict'](ALIKE['integers'][:1000]) + b'q\x000'
    copies = b'(' + call('collections', 'Counter', b'h\x00') * 600 + b't'
    with pytest.raises(CheckpointError, match='more than 2048 numbers'):
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
        optimizer={i: i for i in range(20000)},
        ids={i * 1000003 for i in range(3000)},  # of images, say
        names={f'name {i}': i for i in range(5000)},
        pairs={('text', str(i)): i for i in range(3000)},
        numbers={i / 8: i for i in range(500)},
        places={(i, -i): i for i in range(300)},
        others={None: 1, True: 2, b'bytes': 3, 2**60: 4},
    )
    for protocol in (2, 4):
        assert safe_load(saved(content, protocol=protocol)) == content


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
