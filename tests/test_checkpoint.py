"""The authors' checkpoints: names, files, and what is refused."""

import argparse
import functools
import subprocess
import sys
import threading
from ast import literal_eval
from collections import OrderedDict
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from goldens import Golden
from in_process import run_tool
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner.checkpoint import get_state_dict, weights_to_cpu
from torch import nn
from toy_training import ARCH as TOY_ARCH

from mmbiformer.checkpoint import (
    check_fit,
    convert_official_state_dict,
    load_from_local,
    load_whole_model,
    register_safe_loader,
)
from mmbiformer.engine.checks import CommandError
from mmbiformer.engine.faults import faults_explained
from mmbiformer.models import BiFormer
from mmbiformer.models.biformer import ARCHS
from mmbiformer.registry import MODELS
from mmbiformer.safe_load import CheckpointError

ROOT = Path(__file__).parent.parent
CLASSIFIERS = {
    'tiny': 'biformer_tiny_cls',
    'small': 'biformer_small_cls',
    'base': 'biformer_base_cls',
    'stl': 'biformer_stl_cls',
    'stl_nchw': 'biformer_stl_nchw_cls',
}


def official(name='biformer_tiny_cls', dtype=torch.float32):
    state_dict = Golden(name).official_state_dict()
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_dict.items()}


def classifier(arch):
    pytest.importorskip('mmpretrain')
    init_default_scope('mmpretrain')
    width = 512 if arch in ('tiny', 'small') else 768
    return MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type='mmbiformer.BiFormer', arch=arch, final_norm=True),
            neck=dict(type='mmpretrain.GlobalAveragePooling'),
            head=dict(type='mmpretrain.LinearClsHead', num_classes=1000, in_channels=width),
        )
    )


@pytest.mark.parametrize('arch', CLASSIFIERS)
def test_image_classifier_loads_strictly(arch):
    converted = convert_official_state_dict(official(CLASSIFIERS[arch]))
    classifier(arch).load_state_dict(converted, strict=True)


@pytest.mark.parametrize('name', ['biformer_small_det', 'biformer_small_seg'])
def test_dense_backbone_loads_strictly(name):
    converted = convert_official_state_dict(official(name))
    state_dict = {key.removeprefix('backbone.'): value for key, value in converted.items()}
    BiFormer('small').load_state_dict(state_dict, strict=True)


@pytest.mark.parametrize('name', ['biformer_small_det', 'biformer_tiny_cls'])
@pytest.mark.parametrize('nest', ['', 'model', 'state_dict'])
@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.', 'module.backbone.'])
def test_nesting(name, nest, prefix):
    expected = convert_official_state_dict(official(name))
    assert all(key.startswith(('backbone.', 'head.fc.')) for key in expected)
    state_dict = {prefix + k: v for k, v in official(name).items()}
    found = convert_official_state_dict({nest: state_dict, 'epoch': 3} if nest else state_dict)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_head_beside_a_prefixed_backbone():
    state_dict = {
        key if key.startswith('head.') else f'backbone.{key}': value
        for key, value in official().items()
    }
    state_dict['neck.fpn_convs.0.conv.weight'] = torch.zeros(1)
    found = convert_official_state_dict(state_dict)
    assert set(found) == {
        *convert_official_state_dict(official()),
        'neck.fpn_convs.0.conv.weight',
    }


def test_part_of_the_weights():
    """Of `strict` a backbone hears nothing; what the message says loads a part on purpose."""
    net, other = (BiFormer(TOY_ARCH, region_grid=2) for _ in range(2))
    part = {name: value for name, value in other.state_dict().items() if 'norm' in name}
    with pytest.raises(
        CheckpointError, match=r'is missing.*\{\*\*model\.state_dict\(\), \*\*part\}'
    ):
        net.load_state_dict(part, strict=False)
    for names in ('norm0.', 'stages.0.', 'downsample_layers.'):
        part = {name: value for name, value in other.state_dict().items() if name.startswith(names)}
        with pytest.raises(CheckpointError, match=r'\{\*\*model\.state_dict\(\), \*\*part\}'):
            net.load_state_dict(part, strict=False)
    whole = {**net.state_dict(), KEY: other.state_dict()[KEY]}
    net.load_state_dict(whole)
    assert torch.equal(net.state_dict()[KEY], other.state_dict()[KEY])


def test_a_shallower_arch_is_no_part():
    """Though its names and shapes all fit, as those of tiny fit small."""
    net, shallow = (BiFormer(dict(TOY_ARCH, depths=(n, 1)), region_grid=2) for n in (2, 1))
    with pytest.raises(CheckpointError, match=r'of another arch.*matching arch or file\.$'):
        net.load_state_dict(shallow.state_dict(), strict=False)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_dtypes_are_kept(dtype):
    converted = convert_official_state_dict(official(dtype=dtype))
    assert {value.dtype for value in converted.values()} == {dtype, torch.int64}


@pytest.mark.parametrize(
    'other',
    [
        {'conv1.weight': torch.zeros(1), 'fc.bias': torch.zeros(1)},
        {'model': {'blocks.0.attn.qkv.weight': torch.zeros(1)}},
        {},
        [1, 2],
        BiFormer('tiny').state_dict(),
    ],
)
def test_other_files_are_refused(other):
    with pytest.raises(ValueError, match=r'found .*; expected names such as .*stages.0.0.norm1'):
        convert_official_state_dict(other)


class Canary:
    """Unpickling it leaves a mark."""

    marks = []

    def __reduce__(self):
        return self.marks.append, (1,)


@pytest.fixture
def released(tmp_path):
    """A file as the authors release them, with more beside the weights than tensors."""
    path = tmp_path / 'biformer_tiny_best.pth'
    torch.save(
        dict(
            model=OrderedDict(official()),
            optimizer=dict(state={}, param_groups=[dict(lr=0.1)]),
            epoch=299,
            args=argparse.Namespace(lr=5e-4, hook=Canary()),
        ),
        path,
    )
    return path


def test_released_file_as_init_cfg(released):
    net = MODELS.build(
        dict(
            type='mmbiformer.BiFormer',
            arch='tiny',
            final_norm=True,
            init_cfg=dict(type='Pretrained', checkpoint=str(released)),
        )
    )
    net.init_weights()
    expected = convert_official_state_dict(official())
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[f'backbone.{name}']), name
    assert Canary.marks == []


@pytest.mark.parametrize('prefix', [None, 'backbone.'])
def test_classification_weights_in_a_dense_backbone(released, tmp_path, prefix):
    """The norms of the maps are new, the final norm goes; the log names both."""
    # MMEngine logs to the logger made last.
    MMLogger.get_instance(f'missing {prefix}', log_file=str(tmp_path / 'log'))
    init_cfg = dict(type='Pretrained', checkpoint=str(released))
    if prefix:
        init_cfg['prefix'] = prefix
    net = BiFormer('tiny', region_grid=16, init_cfg=init_cfg)
    net.init_weights()
    expected = convert_official_state_dict(official())
    state_dict = net.state_dict()
    new = {name for name in state_dict if f'backbone.{name}' not in expected}
    assert new == {f'norm{i}.{kind}' for i in range(4) for kind in ('weight', 'bias')}
    assert all(
        torch.equal(value, expected[f'backbone.{name}'])
        for name, value in state_dict.items()
        if name not in new
    )
    log = (tmp_path / 'log').read_text()
    assert 'missing keys in source state_dict: norm0.weight' in log
    assert 'unexpected key in source state_dict: ' in log
    assert 'norm.weight' in log.split('unexpected key')[1]


def test_released_file_in_a_whole_model(released):
    net = classifier('tiny')
    load_checkpoint(net, str(released), map_location='cpu', strict=True)
    assert torch.equal(net.head.fc.bias, official()['head.bias'])
    assert Canary.marks == []


DENSE = {
    'maskrcnn_biformer_s_coco': 'biformer_small_det',
    'retinanet_biformer_s_coco': 'biformer_small_det',
    'sfpn_biformer_s_ade20k': 'biformer_small_seg',
    'upernet_biformer_s_ade20k': 'biformer_small_seg',
}


def authors_dense(config):
    """Names and shapes of a whole detector or segmentor of MMDetection 2 / MMSegmentation 0.x."""
    state_dict = {
        f'backbone.{name}': torch.empty(shape, device='meta')
        for name, shape in Golden(DENSE[config]).shapes().items()
    }
    stem = config.removesuffix('_coco').removesuffix('_ade20k')
    for line in (ROOT / f'tests/data/openmmlab_0x/{stem}.txt').read_text().splitlines():
        if not line.startswith('#'):
            name, shape = line.split(' ', 1)
            state_dict[name] = torch.empty(literal_eval(shape), device='meta')
    return state_dict


@pytest.mark.parametrize('config', DENSE)
def test_whole_detectors_and_segmentors_load_strictly(config, tmp_path):
    """Nothing missing, nothing left over; RetinaNet's unused norm is left out, and logged."""
    pytest.importorskip('mmpretrain')
    MMLogger.get_instance(config, log_file=str(tmp_path / 'log'))
    cfg = Config.fromfile(ROOT / f'configs/{config}.py')
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    checkpoint = dict(meta=dict(CLASSES=('thing',)), state_dict=authors_dense(config))
    converted = convert_official_state_dict(checkpoint)
    unused = {f'backbone.norm0.{kind}' for kind in ('weight', 'bias')}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in converted.items()}
    if 'retinanet' in config:
        assert unused <= found.keys()
        found = {name: shape for name, shape in found.items() if name not in unused}
    assert found == shapes
    model.load_state_dict(converted, strict=True)
    assert unused <= converted.keys() or 'retinanet' not in config  # the caller's dict stays
    log = (tmp_path / 'log').read_text()
    assert ("left out, norms of maps that are not used: ['backbone.norm0" in log) == (
        'retinanet' in config
    )


def test_dense_backbone_of_fewer_maps(tmp_path):
    """A detector's weights as init_cfg: the values arrive, the unused norm does not."""
    path = tmp_path / 'detector.pth'
    state_dict = {
        f'backbone.{name}': value.float() if value.is_floating_point() else value
        for name, value in Golden('biformer_small_det').official_state_dict().items()
    }
    torch.save(dict(state_dict=state_dict), path)
    net = BiFormer('small', out_indices=(1, 2, 3))
    load_checkpoint(net, str(path), strict=True)
    assert torch.equal(net.norm3.weight, state_dict['backbone.extra_norms.3.weight'])
    assert not hasattr(net, 'norm0')


def test_wrong_arch_is_refused(released):
    net = BiFormer('small', init_cfg=dict(type='Pretrained', checkpoint=str(released)))
    with pytest.raises(ValueError, match=r'of another arch.*\(2, 64\).*the model has.*\(4, 64\)'):
        net.init_weights()


@pytest.mark.parametrize('kind', ['released', 'converted', 'ours', '.pth', '.safetensors'])
@pytest.mark.parametrize(('arch', 'other'), [('stl', 'stl_nchw'), ('stl_nchw', 'stl')])
def test_stl_and_stl_nchw_are_told_apart(arch, other, kind, tmp_path):
    """Though names and shapes are the same: by the authors' names, then by the version."""

    def model(arch, **kwargs):
        arch = dict(ARCHS[arch], depths=(1, 1, 1, 1))
        return nn.ModuleDict(dict(backbone=BiFormer(arch, final_norm=True, **kwargs)))

    if kind == 'ours':
        state_dict = weights_to_cpu(get_state_dict(model(arch)))  # as MMEngine saves it
    else:
        shapes = Golden(CLASSIFIERS[arch]).shapes().items()
        state_dict = {
            name: torch.zeros(shape)
            for name, shape in shapes
            if 'blocks' not in name or '.blocks.0.' in name
        }
    if kind == 'converted':
        state_dict = convert_official_state_dict(state_dict)
    path = str(tmp_path / 'model.pth')
    torch.save(dict(state_dict=state_dict), path)
    if kind.startswith('.'):
        run_tool('convert_checkpoint', path, f'{path}{kind}')
        path += kind
    init_cfg = dict(type='Pretrained', checkpoint=path)
    right = model(arch, init_cfg=init_cfg)
    load_checkpoint(right, path)
    right.backbone.init_weights()
    wrong = model(other, init_cfg=init_cfg)
    prefixed = model(other, init_cfg=dict(init_cfg, prefix='backbone.'))
    listed = model(other, init_cfg=[dict(init_cfg, prefix='backbone')])
    for load in (
        lambda: load_checkpoint(wrong, path),
        wrong.backbone.init_weights,
        prefixed.backbone.init_weights,
        listed.backbone.init_weights,
    ):
        with pytest.raises(CheckpointError, match=r"has '(value|input)' .* Choose the matching"):
            load()


def test_other_model_is_refused(tmp_path):
    """Even if some names agree, as those of a ConvNeXt or Swin would."""
    path = tmp_path / 'convnext.pth'
    names = ('downsample_layers.0.0.weight', 'norm3.weight')
    torch.save(dict(state_dict={name: torch.zeros(1) for name in names}), path)
    net = BiFormer('tiny', init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    with pytest.raises(ValueError, match='not a BiFormer checkpoint: found 2 entries such as'):
        net.init_weights()


KEY = 'stages.1.0.attn.qkv.weight'
UNUSABLE = {  # of that key, made of what it should be; and what is said of it
    'none': (lambda good: None, 'is missing'),
    'shape': (lambda good: good[:3], r'is \(3, 32\) instead of \(96, 32\)'),
    'number': (lambda good: torch.ones(()), r'is \(\) instead of'),
    'quantized': (lambda good: (good * 100).to(torch.int8), 'is of torch.int8 instead of'),
    'complex': (lambda good: good.to(torch.complex64), 'is of torch.complex64 instead of'),
    'NaN': (lambda good: good * torch.nan, 'is not finite'),
    'infinite': (lambda good: good / 0, 'is not finite'),
    'too large': (lambda good: good.double() + 1e300, 'is not finite'),
}


@pytest.mark.parametrize('kind', UNUSABLE)
def test_weights_that_cannot_be_used(kind, tmp_path):
    """Torch loads them, or leaves them out, and the model gives nonsense."""
    make, message = UNUSABLE[kind]
    state = BiFormer(TOY_ARCH, region_grid=2).state_dict()
    state[KEY] = make(state[KEY])
    state = {f'backbone.{name}': value for name, value in state.items() if value is not None}
    torch.save(dict(state_dict=state), tmp_path / 'bad.pth')
    register_safe_loader()
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'bad.pth'))
    net = BiFormer(TOY_ARCH, region_grid=2, init_cfg=pretrained)
    with pytest.raises(CheckpointError, match=rf'bad\.pth: .* not all there: {KEY} {message}'):
        net.init_weights()
    whole = nn.ModuleDict(dict(backbone=net))
    with pytest.raises(CheckpointError, match=f'FILE does not fit .*: backbone.{KEY} {message}'):
        check_fit(whole, dict(state_dict=state), 'FILE')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision(dtype, tmp_path):
    good = BiFormer(TOY_ARCH, region_grid=2)
    torch.save(good.to(dtype).state_dict(), tmp_path / 'good.pth')
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'good.pth'))
    net = BiFormer(TOY_ARCH, region_grid=2, init_cfg=pretrained)
    net.init_weights()
    for name, value in net.state_dict().items():
        assert torch.equal(value, good.state_dict()[name].to(value.dtype))


def test_whole_model_is_required(released, tmp_path):
    path = tmp_path / 'backbone.pth'
    torch.save(BiFormer('tiny').state_dict(), path)
    with pytest.raises(CheckpointError, match=r'backbone\.pth: this is not a model around'):
        load_whole_model(str(path))
    load_whole_model(str(released))


def test_registered_for_files_and_urls():
    register_safe_loader()
    for path in ('x.pth', '/tmp/x.pth', 'http://x/y.pth', 'https://x/y.pth'):
        loader = CheckpointLoader._get_checkpoint_loader(path)
        assert loader.__module__ == 'mmbiformer.checkpoint'


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that is served, and its address."""
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setattr(SimpleHTTPRequestHandler, 'log_message', lambda *args: None)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever).start()
        yield tmp_path, f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


def test_download_is_kept(server):
    folder, address = server
    register_safe_loader()
    torch.save(dict(state_dict=dict(a=torch.ones(2))), folder / 'a.pth')
    for _ in range(2):
        loaded = CheckpointLoader.load_checkpoint(f'{address}/a.pth')
        assert torch.equal(loaded['state_dict']['a'], torch.ones(2))
        (folder / 'a.pth').unlink(missing_ok=True)


def test_failed_download(server):
    """The page is not there, or nobody answers."""
    _, address = server
    register_safe_loader()
    for url, reason in ((f'{address}/none.pth', '404'), ('http://127.0.0.1:9/a.pth', 'refused')):
        message = f'{url} cannot be downloaded: .*{reason}'
        with pytest.raises(CheckpointError, match=message) as info:
            CheckpointLoader.load_checkpoint(url)
        with pytest.raises(CommandError) as told, faults_explained(Config()):
            raise info.value
        assert str(told.value) == str(info.value)


@pytest.mark.parametrize('address', ['http://a b/c.pth', 'http://[::1/c.pth', 'http://a/b\nc.pth'])
def test_addresses_that_are_none(address):
    with pytest.raises(CheckpointError, match=r'cannot be downloaded: .*Check the address'):
        register_safe_loader()
        CheckpointLoader.load_checkpoint(address)


def test_download_of_a_page_is_not_kept(server):
    """Once the server has the file, it is loaded."""
    folder, address = server
    register_safe_loader()
    (folder / 'a.pth').write_text('<!DOCTYPE html><html>Too many requests</html>')
    with pytest.raises(CheckpointError, match=rf'{address}/a\.pth: .*HTML'):
        CheckpointLoader.load_checkpoint(f'{address}/a.pth')
    torch.save(dict(state_dict=dict(a=torch.ones(2))), folder / 'a.pth')
    assert CheckpointLoader.load_checkpoint(f'{address}/a.pth')['state_dict']['a'].sum() == 2


def convert(*args):
    return subprocess.run(
        [sys.executable, '-W', 'ignore', 'tools/convert_checkpoint.py', *map(str, args)],
        capture_output=True,
        text=True,
    )


def test_command(released, tmp_path):
    done = convert(released, tmp_path / 'ours.pth')
    assert done.returncode == 0, done.stderr
    state_dict = torch.load(tmp_path / 'ours.pth', weights_only=True)['state_dict']
    classifier('tiny').load_state_dict(state_dict, strict=True)
    again = convert(released, tmp_path / 'ours.pth')
    assert again.returncode == 2
    assert 'exists already' in again.stderr


def test_command_refuses(released, tmp_path):
    text = tmp_path / 'text.pth'
    text.write_text('<html>Not found</html>')
    for source, message in (
        (tmp_path / 'none.pth', 'none.pth'),
        (text, 'HTML'),
    ):
        done = convert(source, tmp_path / 'ours.pth')
        assert done.returncode == 2
        assert message in done.stderr
        assert 'Traceback' not in done.stderr
        assert not (tmp_path / 'ours.pth').exists()


def test_number_that_python_does_not_read():
    """A name of thousands of digits is one that the model does not have, like any other."""
    net = BiFormer('tiny')
    state_dict = net.state_dict()
    digits = '9' * 5000
    state_dict[f'stages.{digits}.0.norm1.weight'] = torch.zeros(64)
    found = net.load_state_dict(state_dict, strict=False)
    assert found.unexpected_keys == [f'stages.{digits}.0.norm1.weight']
    pairs = {f'stages.{digits}.{digits}.norm2.weight': torch.zeros(1)}
    pairs['stages.0.0.mlp1.linear1.0.weight'] = torch.zeros(1)
    converted = convert_official_state_dict(pairs)
    assert f'backbone.stages.{digits}.{digits}.norm2.weight' in converted


def test_names_of_strangers_are_cut_and_escaped(tmp_path):
    MMLogger.get_instance('strangers', log_file=str(tmp_path / 'log'))
    evil = '\x1b[2J\n' + 'a' * 2**20
    with pytest.raises(CheckpointError, match='found 1 entries') as info:
        convert_official_state_dict({evil: torch.zeros(1)})
    messages = [str(info.value)]
    for name in (f'stages.{evil}', evil, 'head.\x1b]0;x\x07', 'head.\u202e\x1b'):
        torch.save(dict(official(), **{name: torch.zeros(1)}), tmp_path / 'evil.pth')
        with pytest.raises(CheckpointError, match='that terminals obey, such as') as info:
            load_whole_model(str(tmp_path / 'evil.pth'))
        messages.append(str(info.value))
    net = BiFormer('tiny', out_indices=(3,))
    net.load_state_dict(dict(net.state_dict(), **{f'norm0.{evil}': torch.zeros(1)}))
    messages.append((tmp_path / 'log').read_text().strip())
    assert 'left out, norms of maps' in messages[-1]
    for message in messages:
        assert len(message) < 1000 and message.isprintable()
        assert '\\x1b' in message
    fine = 'head.größe 1\xa0\u200c\u3000'  # spaces that do not break, and the like
    torch.save(dict(official(), **{fine: torch.zeros(1)}), tmp_path / 'fine.pth')
    load_whole_model(str(tmp_path / 'fine.pth'))


def test_classes_that_are_none(tmp_path, monkeypatch):
    """The hosts' inferencers would fail at them without a word of the file."""
    told, path = [], str(tmp_path / 'x.pth')
    monkeypatch.setattr('mmbiformer.checkpoint.print_log', lambda text, **_: told.append(text))
    for data in ({}, dict(classes=('a', 'b')), dict(CLASSES=['a']), dict(classes=None)):
        torch.save(dict(meta=dict(dataset_meta=data), state_dict={}), path)
        assert load_from_local(path)['meta'] == dict(dataset_meta=data)
    assert told == []
    for data in (5, None, ['a'], {1: 'a'}, dict(classes=5), dict(classes=Path('x'))):
        torch.save(dict(meta=dict(dataset_meta=data, epoch=1), state_dict={}), path)
        assert load_from_local(path)['meta'] == dict(epoch=1)
        assert told.pop().startswith(f'{path}: its meta.dataset_meta ')
    torch.save(dict(meta=dict(CLASSES=5, epoch=1), state_dict={}), path)
    assert load_from_local(path)['meta'] == dict(epoch=1)
    assert told.pop().startswith(f'{path}: its meta.CLASSES ')
    for meta in (5, None, ['dataset_meta']):
        torch.save(dict(meta=meta, state_dict={}), path)
        assert load_from_local(path)['meta'] == {}
        assert told.pop().startswith(f'{path}: its meta ')
    torch.save(dict(meta=torch.ones(2)), path)
    assert load_from_local(path)['meta'].shape == (2,)
    assert told == []


def test_unreadable_file_names_itself(tmp_path):
    path = tmp_path / 'broken.pth'
    path.write_bytes(b'PK\x03\x04 nothing')
    with pytest.raises(CheckpointError, match=r'broken\.pth'):
        CheckpointLoader.load_checkpoint(str(path))
