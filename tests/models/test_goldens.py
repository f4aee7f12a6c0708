"""Equality with the authors' code: every golden in float64, to 1e-9."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmbiformer.layers import BiLevelRoutingAttention, RegionRouter
from mmbiformer.models import BiFormer, BiXT, DeBiFormer
from tests.helpers.goldens import DATA, Golden, parameter, uniform

MODELS = sorted(path.stem for path in DATA.glob('*biformer_*.npz'))
BIXTS = sorted(path.stem for path in DATA.glob('bixt_*.npz'))
FAMILIES = dict(biformer=BiFormer, debiformer=DeBiFormer)
# The authors' names of one attention layer, and ours.
BRA_NAMES = {
    'bra_legacy': {'qkv.qkv': 'qkv', 'wo': 'proj', 'lepe': 'lepe'},
    'bra_nchw': {'qkv_linear': 'qkv', 'output_linear': 'proj', 'lepe': 'lepe'},
}


def test_formula():
    check = Golden('check').arrays
    torch.testing.assert_close(1.7 * uniform('input', (4,)), torch.from_numpy(check['check/input']))
    name = 'downsample_layers.0.0.weight'
    weight = parameter(name, (32, 3, 3, 3)).flatten()[:4]
    torch.testing.assert_close(weight, torch.from_numpy(check['check/weight']))


# The goldens are in float64, which Triton's kernels do not take; see tests/ops/test_triton.py.
@pytest.mark.parametrize('backend', ['auto', 'sdpa', 'reference'])
@pytest.mark.parametrize('name', ['bra_legacy', 'bra_legacy_padded', 'bra_nchw', 'bra_nchw_padded'])
def test_attention(name, backend):
    golden = Golden(name)
    nchw = golden.case['impl'] == 'nchw'
    kwargs = golden.case['kwargs']
    layer = BiLevelRoutingAttention(
        kwargs['dim'],
        kwargs['num_heads'],
        kwargs['topk'],
        region_grid=kwargs['n_win'],
        padding='projected' if nchw else 'input',
        backend=backend,
    ).double()
    weights, names = golden.official_state_dict(), {}
    for key in weights:
        module, _, kind = key.rpartition('.')
        names[key] = f'{BRA_NAMES[name.removesuffix("_padded")][module]}.{kind}'
    own = layer.state_dict()
    layer.load_state_dict(
        {names[key]: value.reshape(own[names[key]].shape) for key, value in weights.items()}
    )

    x = golden.input().requires_grad_()
    out = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if nchw else layer(x)
    golden.check('output', out)
    out.backward(golden.cotangent(out.shape))
    golden.check('grad/input', x.grad)
    for key, value in weights.items():
        grad = layer.get_parameter(names[key]).grad
        golden.check(f'grad/{key}', grad.reshape(value.shape))


def backbone(golden, **kwargs):
    family, arch = golden.case['family'].split('_', 1)
    return FAMILIES[family](arch, **kwargs)


class Classifier(nn.Module):
    """Backbone and head, with the authors' weights."""

    def __init__(self, golden):
        super().__init__()
        self.backbone = backbone(golden, final_norm=True)
        self.head = nn.Module()
        self.head.fc = nn.Linear(self.backbone.norm.num_features, 1000)
        self.double()
        self.load_state_dict(self.ours(golden.official_state_dict()))

    def ours(self, theirs):
        converted = self.backbone.convert_released(theirs)
        return {
            name if name.startswith('head.') else f'backbone.{name}': value
            for name, value in converted.items()
        }

    def forward(self, x):
        features = self.backbone(x)[0]
        return features, self.head.fc(features.mean((2, 3)))


@pytest.mark.parametrize('name', [name for name in MODELS if name.endswith('_cls')])
def test_classification(name):
    golden = Golden(name)
    net = Classifier(golden).eval()
    assert sum(p.numel() for p in net.parameters()) == golden.arrays['n_params']
    with torch.no_grad():
        features, logits = net(golden.input())
        golden.check('features', features)
        golden.check('logits', logits)

        routes = []  # a hook sees whole batches, where blocks else get a few images at a time
        for module in net.modules():
            if isinstance(module, RegionRouter):
                module.register_forward_hook(lambda module, args, out: routes.append(out))
        golden.check('logits', net(golden.input())[1])
    stored = [key for key in golden.arrays if key.startswith('routes/')]
    assert len(stored) == (0 if 'nchw' in name else 2)
    for key, found in zip(stored, (routes[0], routes[-1]), strict=False):
        expected = torch.from_numpy(golden.arrays[key]).long()
        assert torch.equal(found.sort(-1).values, expected)


@pytest.mark.parametrize('name', [name for name in MODELS if name.endswith(('_det', '_seg'))])
def test_dense(name):
    golden = Golden(name)
    net = backbone(golden, region_grid=golden.case['n_win']).double().eval()
    net.load_state_dict(net.convert_released(golden.official_state_dict()))
    with torch.no_grad():
        outs = net(golden.input())
    for i, out in enumerate(outs):
        golden.check(f'stage{i}', out)


@pytest.mark.parametrize('name', BIXTS)
@torch.no_grad()
def test_bixt(name):
    golden = Golden(name)
    weights = BiXT.convert_released(golden.official_state_dict())
    head = weights.pop('head.fc.weight'), weights.pop('head.fc.bias')
    net = BiXT(name.removeprefix('bixt_')).double().eval()
    net.load_state_dict(weights)
    own = sum(p.numel() for p in net.parameters()) + sum(p.numel() for p in head)
    assert own == golden.arrays['n_params']
    maps, kept = [], []
    net.blocks[-2].register_forward_hook(lambda block, args, outs: maps.append(outs[1]))
    net.blocks[-1].register_forward_hook(lambda block, args, outs: kept.append(outs[0]))
    golden.check('logits', F.linear(net(golden.input())[0], *head))
    golden.check('latents', kept[0])
    golden.check('dense_tokens', maps[0].flatten(1, 2))
    dense = BiXT(name.removeprefix('bixt_'), out_type='featmap').double().eval()
    missing, unexpected = dense.load_state_dict(weights, strict=False)
    assert missing == [] and any(
        key.startswith(f'blocks.{len(net.blocks) - 1}') for key in unexpected
    )
    golden.check('dense_tokens', dense(golden.input())[0].flatten(2).mT)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """A whole model makes at most twice the error that plain PyTorch makes in that precision."""
    golden = Golden('biformer_tiny_cls')
    exact = Classifier(golden).eval()
    errors = {}
    with torch.no_grad():
        for module in exact.modules():  # a single region, where routes cannot flip
            if isinstance(module, BiLevelRoutingAttention):
                module.region_grid, module.router.topk = (1, 1), 1
        expected = exact(golden.input())[1]
        for backend in ('reference', 'auto'):
            net = copy.deepcopy(exact).to(dtype)
            for module in net.modules():
                if isinstance(module, BiLevelRoutingAttention):
                    module.backend = backend
            found = net(golden.input().to(dtype))[1].double()
            errors[backend] = ((found - expected).abs().max() / expected.abs().max()).item()
    assert errors['auto'] <= 2 * max(errors['reference'], 2**-20)
    assert errors['auto'] <= 200 * torch.finfo(dtype).eps


def test_training_step():
    golden = Golden('biformer_tiny_train')
    net = Classifier(golden).train()
    _, logits = net(golden.input())
    loss = F.cross_entropy(logits, torch.tensor(golden.case['labels']))
    golden.check('loss', loss)
    loss.backward()
    # The authors' names in the file, ours by running them through the converter.
    numbered = {str(name): torch.tensor(i) for i, name in enumerate(golden.arrays['grad_names'])}
    for name, i in net.ours(numbered).items():
        expected = golden.arrays['grad_norms'][int(i)]
        norm = net.get_parameter(name).grad.norm().item()
        assert norm == pytest.approx(expected, rel=1e-9), name
