"""The authors' names and ours."""

from ast import literal_eval
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmbiformer.errors import CheckpointError
from mmbiformer.models import BiFormer, BiXT, DeBiFormer
from mmbiformer.registry import MODELS
from mmbiformer.weights.names import convert_released, is_released, unnest
from tests.helpers.backbones import toy
from tests.helpers.goldens import DATA, Golden

ROOT = Path(__file__).parents[2]
FAMILIES = {'biformer': BiFormer, 'debiformer': DeBiFormer}
CLASSIFIERS = sorted(path.stem for path in DATA.glob('*_cls.npz'))
BIXTS = sorted(path.stem for path in DATA.glob('bixt_*.npz'))
DENSE = sorted(path.stem for path in [*DATA.glob('*_det.npz'), *DATA.glob('*_seg.npz')])


def empty(shapes, prefix=''):
    """Tensors of these names and shapes, which take no memory."""
    return {f'{prefix}{name}': torch.empty(shape, device='meta') for name, shape in shapes.items()}


def shapes(state_dict):
    return {name: tuple(value.shape) for name, value in state_dict.items()}


@pytest.mark.parametrize('name', CLASSIFIERS + DENSE)
def test_all_names_are_known(name):
    """Every weight of the authors has a place in our model, and every place has one."""
    family, _, arch = name.rpartition('_')[0].partition('_')
    with torch.device('meta'):
        net = FAMILIES[family](arch, final_norm=name in CLASSIFIERS)
    weights = empty(Golden(name).shapes())
    assert is_released(weights)
    expected = {f'backbone.{key}': shape for key, shape in shapes(net.state_dict()).items()}
    if name in CLASSIFIERS:
        width = net.norm.num_features
        expected |= {'head.fc.weight': (1000, width), 'head.fc.bias': (1000,)}
    assert shapes(convert_released(weights)) == expected


@pytest.mark.parametrize('name', BIXTS)
def test_all_names_of_bixt_are_known(name):
    """The table of positions is left out: it belongs to one size of images."""
    with torch.device('meta'):
        net = BiXT(name.removeprefix('bixt_'))
    weights = empty(Golden(name).shapes())
    assert 'fourier_pos_encode.pos' in weights and is_released(weights)
    dim = net.arch['dim']
    head = {'head.fc.weight': (1000, dim), 'head.fc.bias': (1000,)}
    own = {f'backbone.{key}': shape for key, shape in shapes(net.state_dict()).items()}
    assert shapes(convert_released(weights)) == own | head
    del weights['fourier_pos_encode.pos']  # as in the models for 384x384
    assert shapes(convert_released(weights)) == own | head


@pytest.mark.parametrize('name', ['biformer_tiny_cls', 'biformer_small_det', 'bixt_ti_l64_p16'])
@pytest.mark.parametrize('nest', ['', 'model', 'state_dict'])
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.', 'backbone.'])
def test_nesting(name, nest, prefix):
    names = Golden(name).shapes()
    if prefix == 'backbone.':
        names = {key: shape for key, shape in names.items() if not key.startswith('head.')}
    weights = empty(names, prefix)
    checkpoint = {nest: weights, 'epoch': 3, 'args': None} if nest else weights
    assert unnest(checkpoint) is weights and is_released(checkpoint)
    assert shapes(convert_released(checkpoint)) == shapes(convert_released(empty(names)))


WHOLE = {
    'maskrcnn_biformer_s_coco': 'biformer_small_det',
    'retinanet_biformer_s_coco': 'biformer_small_det',
    'sfpn_biformer_s_ade20k': 'biformer_small_seg',
    'upernet_biformer_s_ade20k': 'biformer_small_seg',
}


@pytest.mark.parametrize('config', WHOLE)
def test_whole_detectors_and_segmentors(config):
    """The names of MMDetection 2 and MMSegmentation 0.x. RetinaNet has a norm without use."""
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(ROOT / f'configs/{config}.py')
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    weights = empty(Golden(WHOLE[config]).shapes(), 'backbone.')
    stem = config.removesuffix('_coco').removesuffix('_ade20k')
    for line in (ROOT / f'tests/data/openmmlab_0x/{stem}.txt').read_text().splitlines():
        if not line.startswith('#'):
            name, shape = line.split(' ', 1)
            weights[name] = torch.empty(literal_eval(shape), device='meta')
    found = convert_released(dict(meta=dict(CLASSES=('thing',)), state_dict=weights))
    unused = {f'backbone.norm0.{kind}' for kind in ('weight', 'bias')} & found.keys()
    unused -= model.state_dict().keys()
    assert bool(unused) == ('retinanet' in config)
    expected = {name: shape for name, shape in shapes(found).items() if name not in unused}
    assert expected == shapes(model.state_dict())


@pytest.mark.parametrize(
    'other',
    [
        {'conv1.weight': torch.zeros(1), 'fc.bias': torch.zeros(1)},
        {'model': {'blocks.0.attn.qkv.weight': torch.zeros(1)}},
        {'stages.0.0.mlp.0.weight': 'no tensor'},
        {},
        [1, 2],
        {3: torch.zeros(1)},
        {'a' * 2**20: torch.zeros(1), '\x1b[2J': torch.zeros(1)},
        toy().state_dict(),
    ],
)
def test_other_files_are_refused(other):
    assert not is_released(other)
    with pytest.raises(CheckpointError, match=r'found .* known are BiFormer \(https://') as info:
        convert_released(other)
    assert len(str(info.value)) < 700 and str(info.value).isprintable()
