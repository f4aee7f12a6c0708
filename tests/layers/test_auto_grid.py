"""region_grid='auto' is nothing but a choice of grid; tests/ops/test_routing.py has the rule."""

import pytest
import torch
from torch.export import Dim

from mmbiformer.layers import BiLevelRoutingAttention, DeformableAgentAttention
from mmbiformer.models import BiFormer, DeBiFormer
from mmbiformer.ops import auto_grid

BIFORMER = dict(depths=(1, 1, 1, 1), embed_dims=(32, 32, 64, 64), mlp_ratio=1)
DEBIFORMER = dict(depths=(1, 1, 1, 1), embed_dims=(32, 32, 64, 64), groups=(1, 1, 2, 2))


def routed(topk, **kwargs):
    return BiLevelRoutingAttention(32, 2, topk, **kwargs)


def agents(topk, **kwargs):
    return DeformableAgentAttention(32, 2, topk, 1, 2, 5, 14, **kwargs)


def outputs(net, x):
    """Maps and the gradients of all parameters."""
    net.zero_grad()
    outs = net(x)
    outs = outs if isinstance(outs, tuple) else (outs,)
    sum(out.sin().sum() for out in outs).backward()
    return [*outs, *(p.grad for p in net.parameters() if p.grad is not None)]


def check_equal(auto, given, x):
    given.load_state_dict(auto.state_dict())
    found, expected = outputs(auto, x), outputs(given, x)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize('padding', ['input', 'projected', 'mask'])
@pytest.mark.parametrize(('size', 'topk'), [((14, 14), 16), ((30, 41), 4), ((9, 5), 2)])
def test_equals_the_same_grid_given(padding, size, topk):
    grids = 'auto', auto_grid(size, topk)
    pair = (routed(topk, region_grid=grid, padding=padding) for grid in grids)
    check_equal(*pair, torch.randn(2, *size, 32))


@pytest.mark.parametrize('padding', ['input', 'mask'])
@pytest.mark.parametrize(('size', 'topk'), [((28, 28), 8), ((30, 41), 4), ((9, 13), 2)])
def test_agents_equal_the_same_grid_given(padding, size, topk):
    grids = 'auto', auto_grid(tuple(-(-n // 2) for n in size), topk, size)
    pair = (agents(topk, region_grid=grid, padding=padding) for grid in grids)
    check_equal(*pair, torch.randn(2, *size, 32))


@pytest.mark.parametrize(('model', 'arch'), [(BiFormer, BIFORMER), (DeBiFormer, DEBIFORMER)])
def test_backbones_at_224_equal_the_published_grid(model, arch):
    """Weights trained at 7x7 give the same maps to the last bit."""
    auto, given = (model(arch, region_grid=grid).eval() for grid in ('auto', 7))
    check_equal(auto, given, torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize(
    ('model', 'arch', 'padding'),
    [
        *((BiFormer, BIFORMER, padding) for padding in ('input', 'mask', 'projected')),
        *((DeBiFormer, DEBIFORMER, padding) for padding in ('input', 'mask')),
    ],
)
@torch.no_grad()
def test_all_sizes_from_one_pixel(model, arch, padding):
    net = model(arch, region_grid='auto', padding=padding).eval()
    assert net.min_size == (1, 1)
    for size in [(1, 1), (1, 70), (5, 3), (33, 32), (64, 65), (97, 160), (129, 31)]:
        for i, out in enumerate(net(torch.randn(1, 3, *size))):
            assert out.shape[2:] == tuple(-(-n // 2 ** (i + 2)) for n in size)
            assert out.isfinite().all()


def test_a_map_of_fewer_tokens_than_topk_attends_to_all():
    x = torch.randn(1, 2, 3, 32)
    auto, one = routed(16, region_grid='auto'), routed(1, region_grid=1)
    one.load_state_dict(auto.state_dict())
    for a, b in zip(outputs(auto, x), outputs(one, x), strict=True):
        torch.testing.assert_close(a, b)  # the best regions come first: sums in another order


def test_exported_graphs_are_of_one_size():
    layer, x = routed(4, region_grid='auto').eval(), torch.randn(1, 30, 40, 32)
    sizes = ({1: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
    with pytest.raises(ValueError, match='cannot be exported for all sizes; give region_grid'):
        torch.export.export(layer, (x,), dynamic_shapes=sizes)


@pytest.mark.parametrize('build', [routed, agents])
@torch.no_grad()
def test_compiles_for_each_size(build):
    """With sizes as symbols the rule would make terms that take minutes, or fail."""
    torch.compiler.reset()
    layer, graphs = build(4, region_grid='auto'), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for size in ((14, 14), (14, 21), (29, 28)):
        x = torch.randn(1, *size, 32)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 3  # with symbols there would be two
