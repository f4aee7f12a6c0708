"""A backbone's ``init_cfg=dict(type='Pretrained', checkpoint=FILE)``."""

import argparse
from collections import OrderedDict

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.runner import load_checkpoint
from torch import nn

from mmbiformer.errors import CheckpointError
from mmbiformer.models import BiFormer, BiXT
from mmbiformer.models.biformer import ARCHS
from mmbiformer.registry import MODELS
from mmbiformer.weights.names import convert_released
from tests.helpers.goldens import Golden

RAN = []
HEAD = {'head.fc.weight', 'head.fc.bias'}


class Asks:
    """Is pickled as a call."""

    def __reduce__(self):
        return RAN.append, (1,)


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """A file as the authors release them, with more beside the weights than tensors."""
    path = tmp_path_factory.mktemp('released') / 'biformer_tiny_best.pth'
    content = dict(
        model=OrderedDict(Golden('biformer_tiny_cls').released()),
        optimizer=dict(state={}, param_groups=[dict(lr=0.1)]),
        epoch=299,
        args=argparse.Namespace(lr=5e-4, hook=Asks()),
    )
    torch.save(content, path)
    return path


@pytest.fixture(scope='module')
def expected():
    return convert_released(Golden('biformer_tiny_cls').released())


def pretrained(path, **settings):
    return dict(type='Pretrained', checkpoint=str(path), **settings)


def assert_loaded(net, weights, prefix='backbone.'):
    for name, value in net.state_dict().items():
        if f'{prefix}{name}' in weights:
            assert torch.equal(value, weights[f'{prefix}{name}'].to(value.dtype)), name


def test_released_file(released, expected):
    cfg = dict(type='mmbiformer.BiFormer', arch='tiny', final_norm=True)
    net = MODELS.build(dict(cfg, init_cfg=pretrained(released)))
    net.init_weights()
    assert {f'backbone.{name}' for name in net.state_dict()} < expected.keys()
    assert_loaded(net, expected)
    whole = nn.ModuleDict(dict(backbone=BiFormer(arch='tiny', final_norm=True)))
    load_checkpoint(whole, str(released))
    assert_loaded(whole.backbone, expected)
    assert RAN == []


@pytest.mark.parametrize('prefix', [None, 'backbone', 'backbone.'])
def test_classification_weights_in_a_dense_backbone(released, expected, prefix, tmp_path):
    """The norms of the maps are new, the final norm goes; one line names both."""
    # MMEngine logs to the logger made last.
    MMLogger.get_instance(f'new {prefix}', log_file=str(tmp_path / 'log'))
    settings = {} if prefix is None else dict(prefix=prefix)
    net = BiFormer('tiny', region_grid=16, init_cfg=pretrained(released, **settings))
    net.init_weights()
    new = {name for name in net.state_dict() if f'backbone.{name}' not in expected}
    assert new == {f'norm{i}.{kind}' for i in range(4) for kind in ('weight', 'bias')}
    assert_loaded(net, expected)
    *_, line = (tmp_path / 'log').read_text().splitlines()
    assert 'new: norm0, norm1, norm2, norm3; left out: head, norm' in line


@pytest.mark.parametrize('source', ['released', 'ours'])
@pytest.mark.parametrize(('arch', 'other'), [('stl', 'stl_nchw'), ('stl_nchw', 'stl')])
def test_stl_and_stl_nchw_are_told_apart(arch, other, source, tmp_path):
    """Shapes are the same. What the LePE convolves is told by the name of a parameter."""

    def model(arch, **kwargs):
        return BiFormer(dict(ARCHS[arch], depths=(1, 1, 1, 1)), final_norm=True, **kwargs)

    weights = model(arch).state_dict()
    if source == 'released':
        weights = {
            name: torch.zeros(shape)
            for name, shape in Golden(f'biformer_{arch}_cls').shapes().items()
            if 'blocks' not in name or '.blocks.0.' in name
        }
    path = tmp_path / 'x.pth'
    torch.save(dict(state_dict=weights), path)
    model(arch, init_cfg=pretrained(path)).init_weights()
    with pytest.raises(CheckpointError, match=r'lepe\.weight is missing'):
        model(other, init_cfg=pretrained(path)).init_weights()


@pytest.fixture(scope='module')
def released_bixt(tmp_path_factory):
    """Files as BiXT's authors release them, unpacked: 12 blocks, and 13 for dense tasks."""
    folder, paths = tmp_path_factory.mktemp('bixt'), {}
    for arch in ('ti_l64_p16', 'ti_l64_d13_p16s8'):
        weights = Golden(f'bixt_{arch}').released()
        content = dict(
            epoch=799,
            arch=f'bixt_{arch}',
            state_dict=OrderedDict((f'_orig_mod.{name}', x) for name, x in weights.items()),
            optimizer=dict(state={}, param_groups=[dict(lr=0.1)]),
            args=argparse.Namespace(model=f'bixt_{arch}', hook=Asks()),
        )
        paths[arch] = folder / arch / 'model_best.pth.tar'
        paths[arch].parent.mkdir()
        torch.save(content, paths[arch])
    return paths


def test_bixt_at_another_size(released_bixt):
    """Weights of 224x224 fit a model for 384x384, whose table of positions is larger."""
    net = BiXT('ti_l64_p16', init_cfg=pretrained(released_bixt['ti_l64_p16']))
    net.init_weights()
    weights = convert_released(Golden('bixt_ti_l64_p16').released())
    assert {f'backbone.{name}' for name in net.state_dict()} == weights.keys() - HEAD
    assert_loaded(net, weights)
    assert net(torch.zeros(1, 3, 384, 384))[0].shape == (1, 192)
    assert RAN == []


def test_bixt_of_13_blocks_in_a_dense_backbone(released_bixt, tmp_path):
    """Without the last block, and what the one before tells the latents."""
    MMLogger.get_instance('dense bixt', log_file=str(tmp_path / 'log'))
    path = released_bixt['ti_l64_d13_p16s8']
    net = BiXT('ti_l64_d13_p16s8', out_type='featmap', init_cfg=pretrained(path))
    net.init_weights()
    weights = convert_released(Golden('bixt_ti_l64_d13_p16s8').released())
    assert {f'backbone.{name}' for name in net.state_dict()} < weights.keys()
    assert_loaded(net, weights)
    *_, line = (tmp_path / 'log').read_text().splitlines()
    assert f'{len(net.state_dict())} weights loaded into BiXT; left out: ' in line
    assert line.endswith('blocks.11 in part, blocks.12, head, norm')
    assert 'new: ' not in line


@pytest.mark.parametrize(
    ('file', 'arch', 'out_type', 'message'),
    [
        ('ti_l64_p16', 'ti_l64_d13_p16', 'featmap', r'blocks\.11\..*rv_latents.* is missing'),
        ('ti_l64_p16', 'ti_l64_d13_p16', 'avg_latents', 'blocks'),
        ('ti_l64_d13_p16s8', 'ti_l64_p16s8', 'avg_latents', 'blocks.11'),
        ('ti_l64_p16', 'ed256_l64_p16', 'avg_latents', r'latents is \(1, 64, 192\) instead of'),
        ('ti_l64_p16', 'ti_cnv_l64_p16', 'avg_latents', r'tokenizer\.proj'),
    ],
)
def test_bixt_that_does_not_fit(released_bixt, file, arch, out_type, message):
    net = BiXT(arch, out_type=out_type, init_cfg=pretrained(released_bixt[file]))
    with pytest.raises(CheckpointError, match=f'does not fit this BiXT: .*{message}') as caught:
        net.init_weights()
    assert 'https://github.com/mrkshllr/BiXT' in str(caught.value)
