"""mmpretrain's model hub on our names."""

import pytest
import torch

mmpretrain = pytest.importorskip('mmpretrain')

import mmbiformer.hub.mmpretrain  # noqa: E402, F401
from mmbiformer.models import BiFormer, BiXT  # noqa: E402
from tests.helpers.goldens import Golden  # noqa: E402


def test_get_model(tmp_path):
    path = tmp_path / 'biformer_tiny_best.pth'
    theirs = Golden('biformer_tiny_cls').released()
    torch.save(dict(model=theirs, epoch=299), path)
    names = {*mmpretrain.list_models('biformer*')}
    assert {name for name in names if name.endswith('_3rdparty_in1k')} == {
        f'biformer-{arch}_3rdparty_in1k' for arch in ('base', 'small', 'stl', 'stl-nchw', 'tiny')
    }
    others = [f'biformer-{arch}_tokenlabel_in1k' for arch in ('small', 'base')]
    others += [f'biformer-{arch}_3rdparty_in1kv2' for arch in ('tiny', 'small', 'base')]
    assert {*others} < names
    net = mmpretrain.get_model('biformer-tiny_3rdparty_in1k', pretrained=str(path))
    assert isinstance(net.backbone, BiFormer)
    assert torch.equal(net.head.fc.bias, theirs['head.bias'])


def test_models_without_weights():
    assert set(mmpretrain.list_models('*debiformer*')) == {
        f'debiformer-{arch}_3rdparty_in1k' for arch in ('base', 'small', 'tiny')
    }
    net = mmpretrain.get_model('debiformer-tiny_3rdparty_in1k', head=dict(num_classes=7))
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_bixt(tmp_path):
    path = tmp_path / 'model_best.pth.tar'
    theirs = Golden('bixt_ti_l64_p16').released()
    torch.save(dict(state_dict=theirs, epoch=799), path)
    assert len(mmpretrain.list_models('bixt*')) == 17
    net = mmpretrain.get_model('bixt-ti-l64-p16_3rdparty_in1k', pretrained=str(path))
    assert isinstance(net.backbone, BiXT)
    assert torch.equal(net.head.fc.bias, theirs['head.bias'])
