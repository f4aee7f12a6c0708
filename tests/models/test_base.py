"""The contract that every family stands on, with stages or without, and weights from files."""

from collections import OrderedDict

import pytest
import torch
from mmengine.runner import CheckpointLoader
from torch import nn

from mmbiformer.errors import CheckpointError
from mmbiformer.models import BiFormer, BiXT, DeBiFormer, base
from mmbiformer.models.base import Backbone, families, misfits
from mmbiformer.registry import MODELS
from tests.helpers.backbones import toy


class Plain(Backbone):
    """Latents that read tokens of one scale: no stages, and no maps."""

    authors_page = 'https://example.org/plain'
    min_size = 4, 4

    def __init__(self, depth=3, frozen_stages=-1, **kwargs):
        super().__init__(**kwargs)
        self.frozen_stages = frozen_stages
        self.patch_embed = nn.Sequential(nn.Conv2d(self.in_channels, 8, 4, 4), nn.BatchNorm2d(8))
        self.latents = nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(8)
        self.freeze()

    def forward(self, x):
        self.check_images(x)
        tokens = self.patch_embed(x).flatten(2).mean(2)
        latents = self.latents + tokens[:, None]
        for block in self.blocks:
            latents = latents + block(latents)
        return (self.fc_norm(latents.mean(1)),)

    def frozen_modules(self):
        yield from [self.patch_embed, *self.blocks][: self.frozen_stages + 1]

    def num_layers(self):
        return len(self.blocks) + 2

    def layer_of(self, name):
        if name.startswith('blocks.'):
            return int(name.split('.')[1]) + 1
        return None if name.startswith('fc_norm') else 0

    def may_differ(self, name):
        part, _, rest = name.partition('.')
        return part == 'fc_norm' or (
            part == 'blocks' and int(rest.split('.')[0]) >= len(self.blocks)
        )

    @staticmethod
    def is_released(names):
        return 'layers.0.weight' in names

    @staticmethod
    def convert_released(weights):
        return base.rename(weights, [(r'^layers\.', 'blocks.'), (r'^head\.', 'head.fc.')])


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setitem(MODELS.module_dict, 'Plain', Plain)
    return Plain


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(base, 'print_log', lambda text, **kwargs: lines.append(text))
    return lines


@pytest.fixture
def save(tmp_path):
    """Write weights; give the init_cfg that reads them."""

    def write(weights, **kwargs):
        path = str(tmp_path / 'weights.pth')
        torch.save(weights, path)
        return dict(type='Pretrained', checkpoint=path, **kwargs)

    return write


def loaded(family=BiFormer, **kwargs):
    torch.manual_seed(1)
    net = toy(family, **kwargs)
    net.init_weights()
    return net


def same(net, weights):
    own = net.state_dict()
    return all(torch.equal(own[name], value) for name, value in weights.items())


def prefixed(weights, prefix='backbone.'):
    return OrderedDict((prefix + name, value) for name, value in weights.items())


# A family without stages


def test_families(plain):
    assert families() == [BiFormer, BiXT, DeBiFormer, Plain]


def test_plain_family_trains(plain):
    net = MODELS.build(dict(type='Plain', frozen_stages=1, norm_eval=True)).train()
    assert [tuple(out.shape) for out in net(torch.randn(2, 3, 9, 8))] == [(2, 8)]
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {
        *(f'patch_embed.{part}' for part in ('0.weight', '0.bias', '1.weight', '1.bias')),
        *('blocks.0.weight', 'blocks.0.bias'),
    }
    assert not net.patch_embed.training
    assert net.get_layer_depth('backbone.blocks.2.bias', 'backbone.') == (3, 5)
    assert [net.get_layer_depth(name)[0] for name in ('latents', 'fc_norm.bias')] == [0, 4]
    with pytest.raises(ValueError, match=r'3x8 pixels are too small, .* at least 4x4; resize'):
        net(torch.randn(2, 3, 3, 8))


def test_plain_family_takes_its_authors_files(plain, save, told):
    """Of a deeper model, whose last block has no place here."""
    deeper = Plain(depth=4)
    theirs = {name.replace('blocks.', 'layers.'): v for name, v in deeper.state_dict().items()}
    net = Plain(init_cfg=save(dict(model=dict(theirs, **{'head.weight': torch.ones(9, 8)}))))
    net.init_weights()
    assert same(net, {name: deeper.state_dict()[name] for name in net.state_dict()})
    assert len(told) == 1
    assert told[0].endswith('16 weights loaded into Plain; left out: blocks.3, head')


# Weights from a file, named in init_cfg


@pytest.mark.parametrize('family', [BiFormer, DeBiFormer, BiXT])
def test_file_of_the_same_model(family, save, told):
    weights = toy(family).state_dict()
    for found, settings in (
        (weights, {}),
        (dict(state_dict=weights, meta={}), {}),
        (prefixed(weights, 'module.'), {}),
        (prefixed(weights), dict(prefix='backbone')),
        (prefixed(weights, 'student.backbone.'), dict(prefix='student.backbone.')),
    ):
        assert same(loaded(family, init_cfg=save(found, **settings)), weights)
        path = save(found)['checkpoint']
        assert told[-1] == f'{path}: {len(weights)} weights loaded into {family.__name__}'
    assert len(told) == 5


def test_file_of_another_task(save, told):
    classifier = toy(final_norm=True).state_dict()
    init_cfg = save({**prefixed(classifier), 'head.fc.bias': torch.ones(9)})
    net = loaded(init_cfg=init_cfg, out_indices=(0, 2))
    assert same(net, {name: v for name, v in classifier.items() if name in net.state_dict()})
    assert len(told) == 1
    assert told[0].endswith(
        'loaded into BiFormer; new: norm0, norm2; '
        'left out: downsample_layers.3, head, norm, stages.3'
    )


NORM1 = 'stages.0.0.norm1.weight'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda w: w.pop(NORM1), f'{NORM1} is missing'),
        (
            lambda w: w.update({'stages.0.1.norm1.weight': torch.ones(32)}),
            'stages.0.1.norm1.weight is not in the model',
        ),
        (lambda w: [w.pop(key) for key in [*w] if 'norm2' in key], 'is missing and 7 more'),
    ],
)
def test_file_that_does_not_fit(change, message, save):
    weights = toy().state_dict()
    change(weights)
    net = toy(init_cfg=save(weights))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        net.init_weights()
    assert str(caught.value).startswith(f'{net.init_cfg["checkpoint"]} does not fit this BiFormer')
    assert 'https://github.com/rayleizhu/BiFormer' in str(caught.value)
    assert same(net, before)


def test_no_backbone_at_all(save):
    foreign = {'conv1.weight': torch.ones(2)}
    for content in (foreign, [1, 2], dict(state_dict=3), {}):
        with pytest.raises(CheckpointError, match=r"every 'backbone\.…' is missing"):
            loaded(init_cfg=save(content))
    with pytest.raises(CheckpointError, match=r"'neck\.…' is missing; it holds conv1\.weight\."):
        loaded(init_cfg=save(foreign, prefix='neck'))


def test_file_is_read_once_and_last(save, monkeypatch):
    reads, plain = [], CheckpointLoader.load_checkpoint
    monkeypatch.setattr(
        CheckpointLoader,
        'load_checkpoint',
        lambda *args, **kw: reads.append(args) or plain(*args, **kw),
    )
    weights = {name: v for name, v in toy().state_dict().items() if not name.startswith('norm0')}
    other = dict(type='Constant', layer=['Linear', 'LayerNorm'], val=3.0)
    for init_cfg in ([save(weights), other], [other, save(weights)]):
        net = loaded(init_cfg=init_cfg)
        assert same(net, weights)
        assert (net.norm0.weight == 3).all()
        net.init_weights()  # MMEngine warns that it has been called before
    assert len(reads) == 2
    assert (loaded(init_cfg=other).stages[0][0].mlp.fc1.weight == 3).all()


# load_state_dict, as torch has it


@pytest.mark.parametrize('family', [BiFormer, DeBiFormer, BiXT])
def test_state_dict_under_either_name(family):
    weights = toy(family).state_dict()
    for found in (weights, prefixed(weights)):
        net = toy(family)
        net.load_state_dict(found)
        assert same(net, weights)
    whole = nn.ModuleDict(dict(backbone=toy(family), head=nn.Linear(2, 2)))
    whole.load_state_dict(prefixed(weights), strict=False)
    assert same(whole['backbone'], weights)


def test_state_dict_of_a_part():
    weights = {name: v for name, v in toy().state_dict().items() if name.startswith('stages.1')}
    net = toy()
    result = net.load_state_dict({**weights, 'other.weight': torch.ones(1)}, strict=False)
    assert same(net, weights)
    assert result.unexpected_keys == ['other.weight']
    assert 'stages.0.0.norm1.weight' in result.missing_keys
    with pytest.raises(RuntimeError, match='Missing key'):
        net.load_state_dict(weights)


def test_misfits_spare_counters_that_old_files_lack():
    own = toy().state_dict()
    counters = [name for name in own if name.endswith('num_batches_tracked')]
    assert len(counters) == 5
    assert misfits(own, {name: own[name] for name in own if name not in counters}) == []
