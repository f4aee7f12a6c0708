"""``timm.create_model`` on our names: all that timm's own models do."""

import pytest
import timm
import torch
from mmengine.registry import MODELS, DefaultScope
from timm.data import resolve_model_data_config
from timm.optim import param_groups_layer_decay

from mmbiformer.errors import CheckpointError
from mmbiformer.hub.timm import default_cfgs
from mmbiformer.models import BiFormer, DeBiFormer
from tests.helpers.goldens import Golden

STEM = 'backbone.downsample_layers.0.0.weight'
NAMES = sorted(
    f'{each.__name__.lower()}_{arch}' for each in (BiFormer, DeBiFormer) for arch in each.archs
)
TINY = pytest.mark.parametrize('name', ['biformer_tiny', 'debiformer_tiny'])


class Config(dict):
    """Stands for what the authors' files hold beside weights, and timm's own reader refuses."""


@pytest.fixture(scope='module')
def weights():
    """The goldens' weights under our names, by model."""
    found = {}
    for name, family in (('biformer_tiny', BiFormer), ('debiformer_tiny', DeBiFormer)):
        converted = family.convert_released(Golden(f'{name}_cls').released())
        found[name] = {
            key if key.startswith('head.') else f'backbone.{key}': value
            for key, value in converted.items()
        }
    return found


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """Files as the authors release them, by model."""
    folder = tmp_path_factory.mktemp('released')
    for name in ('biformer_tiny', 'debiformer_tiny'):
        content = dict(model=Golden(f'{name}_cls').released(), epoch=299, args=Config(lr=1.0))
        torch.save(content, folder / f'{name}.pth')
    return {path.stem: path for path in folder.iterdir()}


def create(name, file=None, **kwargs):
    """A model; with weights of a file, if one is given."""
    if file is not None:
        kwargs.update(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    return timm.create_model(name, **kwargs).eval()


def test_lists_the_models():
    assert timm.list_models('*biformer*') == NAMES
    with_weights = [f'{name}.in1k' for name in NAMES if name.startswith('biformer')]
    assert timm.list_pretrained('*biformer*') == with_weights


def test_settings_of_images_and_weights():
    net = create('biformer_tiny')
    data = resolve_model_data_config(net)
    assert data['input_size'] == (3, 224, 224)
    assert (data['crop_pct'], data['interpolation']) == (0.875, 'bicubic')
    assert data['mean'] == (0.485, 0.456, 0.406)
    assert net.default_cfg is net.pretrained_cfg
    assert net.get_submodule(net.pretrained_cfg['first_conv']).in_channels == 3
    assert net.get_submodule(net.pretrained_cfg['classifier']) is net.get_classifier()
    urls = [each.default.url for each in default_cfgs.values() if each.default.url]
    assert {url for url, _ in urls} == {*BiFormer.released.values()}
    assert len({cached for _, cached in urls}) == len(urls)  # the addresses all end alike
    with pytest.raises(RuntimeError, match='No pretrained weights exist for debiformer_tiny'):
        timm.create_model('debiformer_tiny', pretrained=True)


@TINY
def test_classifier(name, released, weights):
    net = create(name, released[name])
    assert net.state_dict().keys() == weights[name].keys()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in weights[name].items())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = net.forward_features(images)
        pooled = features.mean((2, 3))
        torch.testing.assert_close(net.forward_head(features, pre_logits=True), pooled)
        torch.testing.assert_close(net(images), net.get_classifier()(pooled))
    assert (tuple(features.shape), net.num_features) == ((1, 512, 2, 3), 512)
    net.reset_classifier(7)
    assert net(images).shape == (1, 7)
    assert net.get_classifier().out_features == net.num_classes == 7
    net.reset_classifier(0, '')
    assert net(images).shape == (1, 512, 2, 3)


def test_failed_download():
    overlay = dict(url=('http://127.0.0.1:9/none', 'none.pth'))
    with pytest.raises(CheckpointError, match=r'github\.com/rayleizhu/BiFormer and give its path'):
        timm.create_model('biformer_tiny', pretrained=True, pretrained_cfg_overlay=overlay)


def test_download(released, weights, tmp_path):
    """Under the name that timm is told, into the folder that it is told."""
    overlay = dict(url=(released['biformer_tiny'].as_uri(), 'biformer_tiny_in1k.pth'))
    net = create(
        'biformer_tiny', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path
    )
    assert [path.name for path in tmp_path.iterdir()] == ['biformer_tiny_in1k.pth']
    assert torch.equal(net.head.fc.bias, weights['biformer_tiny']['head.fc.bias'])


@TINY
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_fine_tuning(name, channels, released, weights):
    """Other classes and other images: timm drops the classifier and adapts the stem."""
    net = create(name, released[name], num_classes=7, in_chans=channels, drop_path_rate=0.1)
    own, theirs = net.state_dict(), weights[name]
    kept = {key for key in own if key != STEM and not key.startswith('head.')}
    assert all(torch.equal(own[key], theirs[key]) for key in kept)
    assert net.num_classes == len(net.head.fc.bias) == 7
    if channels == 1:
        torch.testing.assert_close(own[STEM], theirs[STEM].sum(1, keepdim=True))
    else:
        scale = 3 / channels
        torch.testing.assert_close(own[STEM][:, :3], theirs[STEM] * scale)
    assert net(torch.randn(2, channels, 32, 32)).shape == (2, 7)


@TINY
def test_features(name, released, weights):
    """The stages' maps as they are, from a network without what they do not need."""
    net = create(name, released[name], features_only=True, out_indices=(1, 3))
    assert net.feature_info.channels() == [128, 512]
    assert net.feature_info.reduction() == [8, 32]
    images = torch.randn(1, 3, 64, 96)
    whole = create(name, released[name])
    with torch.no_grad():
        found, expected = net(images), []
        x = whole.backbone.prepare(images)
        for i in range(4):
            x = whole.backbone.run_stage(i, x)
            expected += [x] if i in (1, 3) else []
        torch.testing.assert_close(whole.backbone.norm(found[1]), whole.forward_features(images))
    assert all(map(torch.equal, found, expected))
    assert all(each.is_contiguous() for each in found)


@TINY
@pytest.mark.parametrize(
    ('out_indices', 'channels'), [((0, 1), [64, 128]), ([-1], [512]), (None, [64, 128, 256, 512])]
)
def test_features_use_every_parameter(name, out_indices, channels):
    net = timm.create_model(name, features_only=True, out_indices=out_indices)
    assert net.feature_info.channels() == channels
    sum(each.square().sum() for each in net(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert len(net.model.backbone.stages) == (2 if channels[-1] == 128 else 4)


@torch.no_grad()
def test_forward_intermediates():
    net = create('biformer_tiny')
    images = torch.randn(1, 3, 64, 64)
    last, maps = net.forward_intermediates(images)
    assert [each.shape[1] for each in maps] == [64, 128, 256, 512]
    assert torch.equal(last, net.forward_features(images))
    normed = net.forward_intermediates(images, indices=[0, 3], norm=True, intermediates_only=True)
    assert torch.equal(normed[0], maps[0])
    assert torch.equal(normed[1], last)
    last, found = net.forward_intermediates(images, indices=[1], stop_early=True)
    assert torch.equal(last, found[0])
    assert torch.equal(found[0], maps[1])
    with pytest.raises(ValueError, match="output_fmt='NLC' must be 'NCHW'"):
        net.forward_intermediates(images, output_fmt='NLC')


def test_pruned_classifier():
    net = create('biformer_tiny')
    assert net.prune_intermediate_layers([1], prune_head=False) == [1]
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 128, 8, 8)
    net.reset_classifier(7, 'avg')
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 7)


@TINY
def test_layer_decay(name):
    net = timm.create_model(name)
    names = {param: key for key, param in net.named_parameters()}
    for group in param_groups_layer_decay(net, layer_decay=0.5):
        for param in group['params']:
            depth, count = net.backbone.get_layer_depth(names[param], 'backbone.')
            assert group['lr_scale'] == 0.5 ** (count - 1 - depth)
    assert net.group_matcher(coarse=True)['stem'] == net.group_matcher()['stem']


def test_what_timms_scripts_pass():
    """Its train.py and benchmark.py name options that they leave None, and a device."""
    unset = dict.fromkeys(('drop_block_rate', 'bn_momentum', 'bn_eps', 'scriptable'))
    net = timm.create_model(
        'debiformer_tiny', drop_rate=0.1, global_pool='max', device='cpu', dtype=torch.half, **unset
    )
    assert {p.dtype for p in net.parameters()} == {torch.half}
    assert net.head.drop.p == 0.1


def test_files_of_a_backbone_and_of_ours(tmp_path):
    path = tmp_path / 'FILE'
    net = timm.create_model('biformer_tiny')
    own = net.backbone.state_dict()
    for saved in (own, {'model': own}, {f'module.{name}': value for name, value in own.items()}):
        torch.save(saved, path)
        found = create('biformer_tiny', path).backbone.state_dict()
        assert all(torch.equal(found[name], value) for name, value in own.items())
    torch.save(net.state_dict(), path)
    found = create('biformer_tiny', checkpoint_path=str(path))
    assert torch.equal(found.head.fc.weight, net.head.fc.weight)


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg'])
@TINY
def test_backbones_of_the_hosts(scope, name):
    """MMDetection takes mmpretrain's."""
    pytest.importorskip(scope)
    DefaultScope._instance_dict.clear()
    settings = dict(type=f'{scope}.TIMMBackbone', model_name=name, pretrained=False)
    net = MODELS.build(dict(settings, features_only=True, out_indices=(1, 2, 3)))
    fpn = 'mmseg.FPN' if scope == 'mmseg' else 'mmdet.FPN'
    neck = dict(type=fpn, in_channels=[128, 256, 512], out_channels=8, num_outs=3)
    neck = MODELS.build(neck)
    maps = net(torch.randn(1, 3, 64, 64))
    assert all(each.is_contiguous() for each in maps)
    sum(each.sum() for each in neck(maps)).backward()
    assert all(p.grad is not None for p in net.parameters())
    if scope == 'mmpretrain':
        (last,) = MODELS.build(settings)(torch.randn(1, 3, 64, 64))
        assert last.shape == (1, 512, 2, 2)
        assert last.is_contiguous()
