"""``timm.create_model`` on BiXT: latents that are pooled, and maps of one stride."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.optim import param_groups_layer_decay

from mmbiformer.errors import CheckpointError
from mmbiformer.hub.timm import default_cfgs
from mmbiformer.models import BiXT
from tests.helpers.goldens import Golden

NAMES = 'bixt_ti_l64_p16', 'bixt_ti_cnv_l64_d13_p16'
EACH = pytest.mark.parametrize('name', NAMES)
STEMS = dict(zip(NAMES, ('tokenizer.proj.weight', 'tokenizer.proj.0.0.weight'), strict=True))


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """Files as the authors release them, by model."""
    folder = tmp_path_factory.mktemp('released')
    for name in NAMES:
        torch.save(dict(state_dict=Golden(name).released(), epoch=799), folder / f'{name}.pth.tar')
    return {name: str(folder / f'{name}.pth.tar') for name in NAMES}


def create(name, file=None, **kwargs):
    """A model; with weights of a file, if one is given."""
    if file is not None:
        kwargs.update(pretrained=True, pretrained_cfg_overlay=dict(file=file))
    return timm.create_model(name, **kwargs).eval()


def test_lists_the_models():
    assert {*timm.list_models('bixt*')} == {f'bixt_{arch}' for arch in BiXT.archs}
    assert timm.list_pretrained('bixt*') == []  # the authors' zip files have to be unpacked
    assert default_cfgs['bixt_ti_l64_p16'].default.origin_url == BiXT.authors_page
    with pytest.raises(RuntimeError, match='No pretrained weights exist for bixt_ti_l64_p16'):
        timm.create_model('bixt_ti_l64_p16', pretrained=True)


@EACH
def test_classifier(name, released):
    golden = Golden(name)
    net = create(name, released[name]).double()
    data = resolve_model_data_config(net)
    assert (data['input_size'], data['crop_pct']) == ((3, 224, 224), 0.875)
    assert net.get_submodule(net.pretrained_cfg['first_conv']).in_channels == 3
    assert net.get_submodule(net.pretrained_cfg['classifier']) is net.get_classifier()
    with torch.no_grad():
        latents = net.forward_features(golden.input())
        golden.check('latents', latents, rtol=1e-5)  # the file is in float32
        golden.check('logits', net(golden.input()), rtol=1e-5)
        pooled = net.forward_head(latents, pre_logits=True)
        assert torch.equal(net(golden.input()), net.get_classifier()(pooled))
    assert latents.shape[1:] == (64, net.num_features)
    net.reset_classifier(7)
    assert net(golden.input()).shape[1:] == (7,)
    assert net.get_classifier().out_features == net.num_classes == 7
    net.reset_classifier(0, '')
    assert net(golden.input()).shape[1:] == (64, 192)


def test_file_that_does_not_fit(released):
    with pytest.raises(CheckpointError, match=r'does not fit this BiXT: .*tokenizer\.proj'):
        create(NAMES[0], released[NAMES[1]])


@EACH
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_fine_tuning(name, channels, released):
    """Other classes and other images: timm drops the classifier and adapts the stem."""
    net = create(name, released[name], num_classes=7, in_chans=channels, drop_path_rate=0.1)
    theirs = BiXT.convert_released(Golden(name).released())
    own, stem = net.backbone.state_dict(), STEMS[name]
    assert all(torch.equal(own[key], theirs[key]) for key in own if key != stem)
    if channels == 1:
        torch.testing.assert_close(own[stem], theirs[stem].sum(1, keepdim=True))
    else:
        torch.testing.assert_close(own[stem][:, :3], theirs[stem] * (3 / channels))
    assert net.num_classes == len(net.head['fc'].bias) == 7
    assert net(torch.randn(2, channels, 64, 32)).shape == (2, 7)


def test_features(released):
    """Maps as they are, from a network without what they do not need."""
    name = NAMES[0]
    net = timm.create_model(
        name, features_only=True, out_indices=(2, 5), pretrained=True,
        pretrained_cfg_overlay=dict(file=released[name]),
    )  # fmt: skip
    assert net.feature_info.channels() == [192, 192]
    assert net.feature_info.reduction() == [16, 16]
    images = torch.randn(1, 3, 64, 96)
    found = net(images)
    dense = BiXT('ti_l64_p16', out_type='featmap', out_indices=(2, 5))
    weights = BiXT.convert_released(Golden(name).released())
    assert dense.load_state_dict(weights, strict=False).missing_keys == []
    assert all(map(torch.equal, found, dense(images)))
    sum(each.square().sum() for each in found).backward()
    assert all(p.grad is not None for p in net.parameters())
    (last,) = timm.create_model(name, features_only=True)(images)
    assert last.shape == (1, 192, 4, 6)


@torch.no_grad()
def test_forward_intermediates():
    net = create(NAMES[0])
    images = torch.randn(1, 3, 64, 64)
    latents, maps = net.forward_intermediates(images, indices=[0, 10])
    assert torch.equal(latents, net.forward_features(images))
    assert [tuple(each.shape) for each in maps] == [(1, 192, 4, 4)] * 2
    assert len(net.forward_intermediates(images, intermediates_only=True)) == 11
    with pytest.raises(ValueError, match="output_fmt='NLC' must be 'NCHW'"):
        net.forward_intermediates(images, output_fmt='NLC')


def test_layer_decay():
    net = timm.create_model(NAMES[0])
    names = {param: key for key, param in net.named_parameters()}
    for group in param_groups_layer_decay(net, layer_decay=0.5):
        for param in group['params']:
            depth, count = net.backbone.get_layer_depth(names[param], 'backbone.')
            assert group['lr_scale'] == 0.5 ** (count - 1 - depth)


def test_what_timms_scripts_pass():
    """Its train.py and benchmark.py name options that they leave None, and a device."""
    unset = dict.fromkeys(('drop_block_rate', 'bn_momentum', 'bn_eps', 'scriptable'))
    net = timm.create_model(NAMES[0], drop_rate=0.1, device='cpu', dtype=torch.half, **unset)
    assert {p.dtype for p in net.parameters()} == {torch.half}
    assert net.head['drop'].p == 0.1
    with pytest.raises(ValueError, match="global_pool='max' must be 'avg' or ''"):
        timm.create_model(NAMES[0], global_pool='max')


def test_training_step():
    """The gradient reaches every parameter, also where blocks are computed again."""
    net = timm.create_model('bixt_ti_l32_p16', num_classes=3, drop_path_rate=0.0)
    torch.nn.init.normal_(net.get_classifier().weight)
    net.set_grad_checkpointing()
    assert net.backbone.with_cp
    F.cross_entropy(net(torch.randn(2, 3, 64, 64)), torch.tensor([0, 2])).backward()
    assert all(p.grad is not None for p in net.parameters())
