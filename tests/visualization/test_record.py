"""Records of routes, attention, agents and latents: right, and without a trace in the output."""

import pytest
import torch
from torch import nn

from mmbiformer.models import BiFormer, BiXT, DeBiFormer
from mmbiformer.ops import routed_attention
from mmbiformer.visualization import record
from tests.helpers.backbones import toy
from tests.helpers.goldens import Golden

FAMILIES = pytest.mark.parametrize('family', [BiFormer, DeBiFormer, BiXT])
PADDINGS = 'input', 'mask', 'projected'


@FAMILIES
@torch.no_grad()
def test_changes_no_bit(family):
    net, images = toy(family).eval(), torch.randn(2, 3, 75, 91)
    expected = net(images)
    with record(net) as seen:
        found = net(images)
    assert all(map(torch.equal, found, expected))
    assert len(seen.routed) + len(seen.exchanges) >= 4
    count = len(seen.routed), len(seen.exchanges)
    net(images)
    assert count == (len(seen.routed), len(seen.exchanges))  # nothing is watched any more
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not any('_positions' in m.__dict__ for m in net.modules())


@pytest.mark.parametrize(
    ('family', 'padding'),
    [*((BiFormer, each) for each in PADDINGS), *((DeBiFormer, each) for each in PADDINGS[:2])],
)
@torch.no_grad()
def test_attention_gives_the_output(family, padding):
    """The recorded weights, times values, are what the operator gives; nothing else is attended."""
    net = toy(family, padding=padding, region_grid=3).eval()
    with record(net) as seen:
        net(torch.randn(2, 3, 75, 91))
    for block in seen.routed:
        value = torch.randn(*block.key.shape[:3], block.key.shape[3])
        out = routed_attention(
            block.query,
            block.key,
            value,
            block.routes,
            num_heads=block.num_heads,
            region_size=block.region_size,
            key_region_size=block.key_region_size,
            scale=block.scale,
        )
        height, width = block.query.shape[1:3]
        for image, y, x in ((0, 0, 0), (1, height - 1, width - 1), (1, height // 2, 1)):
            weights = block.attention(image, y, x)
            heads = value[image].unflatten(2, (block.num_heads, -1))
            expected = torch.einsum('hyx,yxhc->hc', weights, heads).flatten()
            torch.testing.assert_close(out[image, y, x], expected, atol=1e-5, rtol=1e-4)
            assert torch.equal(weights.sum(0) > 0, block.reached(image, y, x))


@torch.no_grad()
def test_routes_and_affinities():
    net = toy(region_grid=3).eval()
    with record(net) as seen:
        net(torch.randn(2, 3, 96, 96))
    for block in seen.routed:
        assert (block.query_grid, block.key_grid) == ((3, 3), (3, 3))
        best = block.affinity.topk(block.routes.shape[2])
        torch.testing.assert_close(block.affinity.gather(2, block.routes), best.values)
        assert block.popularity(1).sum() == block.routes[1].numel()
        assert block.positions is None
    assert [block.name for block in seen.routed][:2] == ['stages.0.0.attn', 'stages.1.0.attn']


@torch.no_grad()
def test_agents():
    net = toy(DeBiFormer, region_grid=3).eval()
    with record(net) as seen:
        net(torch.randn(2, 3, 96, 64))
    agents = [block for block in seen.routed if block.positions is not None]
    assert 0 < len(agents) < len(seen.routed)
    for block in agents:
        groups = net.get_submodule(block.name).num_groups
        batch, rows, cols, found, two = block.positions.shape
        assert (batch, found, two) == (2, groups, 2)
        assert rows <= block.query.shape[1] and cols <= block.query.shape[2]
        assert block.positions.abs().max() <= 1


@torch.no_grad()
def test_latents():
    """The maps of each latent, times the tokens' values, are what the latents gather."""
    net, gathered = toy(BiXT).eval(), []
    for module in net.modules():
        if hasattr(module, 'proj_latents'):
            hook = lambda m, args: gathered.append(args[0])  # noqa: E731
            module.proj_latents.register_forward_pre_hook(hook)
    with record(net) as seen:
        net(torch.randn(2, 3, 64, 96))
    assert len(seen.exchanges) == len(gathered) == 4
    for block, expected in zip(seen.exchanges, gathered, strict=True):
        maps = block.maps(1)
        values = block.module.rv_tokens(block.tokens).chunk(2, -1)[1][1]
        heads = values.unflatten(2, (block.module.num_heads, -1))
        found = torch.einsum('hnyx,yxhc->nhc', maps, heads).flatten(1)
        torch.testing.assert_close(found, expected[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('name', ['biformer_tiny_cls', 'biformer_stl_cls', 'debiformer_tiny_cls'])
@torch.no_grad()
def test_routes_of_the_goldens(name):
    """The authors' code, in float64, chooses these regions."""
    golden = Golden(name)
    family = DeBiFormer if name.startswith('de') else BiFormer
    net = family(name.split('_')[1], final_norm=True).double().eval()
    weights = family.convert_released(golden.official_state_dict())
    net.load_state_dict({k: v for k, v in weights.items() if not k.startswith('head.')})
    with record(net) as seen:
        net(golden.input())
    stored = [x for key, x in golden.arrays.items() if key.startswith('routes/')]
    assert len(stored) == 2
    for theirs, block in zip(stored, (seen.routed[0], seen.routed[-1]), strict=True):
        assert torch.equal(block.routes.sort(-1).values, torch.from_numpy(theirs).long())


@torch.no_grad()
def test_inside_other_models():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = toy()

        def forward(self, x):
            return [each.mean() for each in self.backbone(x)]

    with record(Detector().eval()) as seen:
        pass
    model = Detector().eval()
    with record(model) as seen:
        model(torch.randn(1, 3, 64, 64))
        model(torch.randn(1, 3, 64, 64))
    assert [block.name for block in seen.routed[:1]] == ['backbone.stages.0.0.attn']
    assert len(seen.routed) == 2 * len({block.name for block in seen.routed})


def test_fails_as_the_model_fails():
    net = toy().eval()
    with pytest.raises(ValueError, match='images'), record(net):
        net(torch.randn(3, 64, 64))
    assert not any(m._forward_hooks for m in net.modules())
