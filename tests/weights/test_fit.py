"""Checkpoints that do not fit a model are refused, with one message."""

import pytest
import torch
from mmengine.model import BaseTTAModel, MMDistributedDataParallel
from torch import nn

from mmbiformer.errors import CheckpointError
from mmbiformer.models import BiFormer, DeBiFormer
from mmbiformer.weights.fit import check_backbones, check_fit, load_whole_model
from tests.helpers.backbones import ARCHS, toy
from tests.helpers.goldens import Golden

KEY = 'backbone.stages.1.0.attn.qkv.weight'
MISFITS = {  # made of the right weight, and what is said of it
    'missing': (lambda good: None, 'is missing'),
    'shape': (lambda good: good[:3], r'is \(3, 64\) instead of \(192, 64\)'),
    'number': (lambda good: torch.ones(()), r'is \(\) instead of \(192, 64\)'),
    'no tensor': (lambda good: 'x', r'is \(\) instead of \(192, 64\)'),
    'quantized': (lambda good: good.to(torch.int8), 'is of torch.int8 instead of torch.float32'),
}


def whole(backbone=None, classes=3):
    """A model with a head around a backbone."""
    return nn.ModuleDict(dict(backbone=backbone or toy(), head=nn.Linear(128, classes)))


@pytest.fixture(scope='module')
def state():
    return whole().state_dict()


@pytest.mark.parametrize('kind', MISFITS)
@pytest.mark.parametrize('check', [check_fit, check_backbones])
def test_misfits(kind, check, state):
    make, message = MISFITS[kind]
    found = {name: make(value) if name == KEY else value for name, value in state.items()}
    found = {name: value for name, value in found.items() if value is not None}
    message = rf'^FILE does not fit .*: {KEY} {message}\. Take the config'
    with pytest.raises(CheckpointError, match=message):
        check(whole(), dict(state_dict=found), 'FILE')


@pytest.mark.parametrize('check', [check_fit, check_backbones])
def test_what_fits(check, state):
    """Nested, bare, of other precision, and with more than is needed."""
    half = {name: value.half() for name, value in state.items() if value.is_floating_point()}
    for found in (
        state,
        dict(state_dict=state, optimizer={}),
        {f'module.{name}': value for name, value in state.items()},
        dict(model=half),  # old files do not count batches
        {**state, 'neck.weight': torch.ones(1)},
    ):
        check(whole(), found, 'FILE')


@pytest.mark.parametrize('check', [check_fit, check_backbones])
def test_weights_of_a_larger_arch(check):
    """Their names and shapes include those of the smaller one, as BiFormer-S those of T."""
    arch = dict(ARCHS[BiFormer], depths=(1, 3, 2, 1))
    larger = whole(toy(arch=arch)).state_dict()
    assert {*whole().state_dict()} < {*larger}
    with pytest.raises(CheckpointError, match=r'backbone\.stages\.1\.\S+ is not in the model'):
        check(whole(), larger, 'FILE')


def test_wrapped_models(state, monkeypatch):
    class Augmented(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            raise NotImplementedError

    augmented = nn.Module.__new__(Augmented)
    nn.Module.__init__(augmented)
    augmented.module = whole()
    monkeypatch.setattr(MMDistributedDataParallel, '__init__', lambda self: None)
    parallel = MMDistributedDataParallel()
    nn.Module.__init__(parallel)
    parallel.module = whole()
    for model in (augmented, parallel):
        check_fit(model, state, 'FILE')
        check_backbones(model, state, 'FILE')
        with pytest.raises(CheckpointError, match=r'head\.bias is missing'):
            check_fit(model, {k: v for k, v in state.items() if k != 'head.bias'}, 'FILE')


def test_message_is_short(state):
    with pytest.raises(CheckpointError, match=r'is missing and \d+ more\. Take') as info:
        check_fit(whole(), {'head.weight': state['head.weight']}, 'FILE')
    assert str(info.value).count('missing') == 3


def test_backbone_of_a_detector_for_other_classes(state):
    """Its head and the norms of its maps are new."""
    with pytest.raises(CheckpointError, match=r'head\.weight is'):
        check_fit(whole(classes=7), state, 'FILE')
    check_backbones(whole(classes=7), state, 'FILE')
    check_backbones(whole(toy(out_indices=(1, 2))), state, 'FILE')
    check_backbones(whole(toy(final_norm=True)), state, 'FILE')
    check_backbones(toy(), toy().state_dict(), 'FILE')


def test_other_backbones(state):
    """Another arch, another family, no backbone, and a backbone alone, which MMEngine ignores."""
    alone = {name.removeprefix('backbone.'): value for name, value in state.items()}
    deeper = toy(arch=dict(ARCHS[type(toy())], depths=(1, 2, 2, 1)))
    for model, found in (
        (whole(deeper), state),
        (whole(toy(DeBiFormer)), state),
        (whole(), {'backbone.conv1.weight': torch.ones(1), 'head.weight': torch.ones(1)}),
        (whole(), alone),
    ):
        with pytest.raises(CheckpointError, match='does not fit the model of the config'):
            check_backbones(model, found, 'FILE')


@pytest.mark.parametrize(
    ('place', 'prefix'),
    [
        ('detector.backbone', 'detector.backbone.'),
        ('image_encoder.0', 'image_encoder.0.'),
        ('student.backbone', 'backbone.'),  # SoftTeacher takes a plain detector
    ],
)
def test_backbones_elsewhere(place, prefix, state, tmp_path):
    model = nn.Module()
    outer, _, inner = place.partition('.')
    model.add_module(outer, nn.ModuleDict({inner: toy()}))
    found = {
        name.replace('backbone.', prefix): value
        for name, value in state.items()
        if name.startswith('backbone.')
    }
    torch.save(dict(state_dict=found), tmp_path / 'x.pth')
    checkpoint = load_whole_model(tmp_path / 'x.pth')
    check_backbones(model, checkpoint, 'FILE')
    del checkpoint['state_dict'][f'{prefix}stages.0.0.norm1.weight']
    with pytest.raises(CheckpointError, match=rf'{prefix}stages\.0\.0\.norm1\.weight is missing'):
        check_backbones(model, checkpoint, 'FILE')


def test_load_whole_model(state, tmp_path):
    """Wherever the weights are, they are under ``state_dict`` then."""
    path, released = tmp_path / 'x.pth', Golden('biformer_tiny_cls').released()
    for content in (state, dict(model=state), dict(state_dict=state, meta=dict(epoch=1))):
        torch.save(content, path)
        loaded = load_whole_model(path)
        assert loaded['state_dict'].keys() == state.keys()
        assert loaded.get('meta', {}) == content.get('meta', {})
        check_fit(whole(), loaded, path)
    torch.save(dict(model=released), path)
    assert 'head.fc.bias' in load_whole_model(path)['state_dict']


@pytest.mark.parametrize('content', [[1, 2], 3, {}, {1: torch.ones(1)}, {'state_dict': {'a': 1}}])
def test_no_weights_by_name(content, tmp_path):
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'x\.pth holds a \w+, not weights by name'):
        load_whole_model(tmp_path / 'x.pth')
