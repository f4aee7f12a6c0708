"""region_grid='auto': the rule, and that it is nothing but a choice of grid."""

import math

import pytest
import torch
from torch.export import Dim

from mmbiformer.layers import BiLevelRoutingAttention, DeformableAgentAttention
from mmbiformer.models import BiFormer, DeBiFormer
from mmbiformer.ops import auto_grid, num_regions

# Strides of the routed stages and the regions that each is routed to.
STAGES = [(4, 1), (8, 4), (16, 16)]
AGENT_STAGES = [(4, 4, 8), (8, 8, 4), (16, 16, 2), (32, 49, 1)]  # and tokens per agent
BIFORMER = dict(depths=(1, 1, 1, 1), embed_dims=(32, 32, 64, 64), mlp_ratio=1)
DEBIFORMER = dict(depths=(1, 1, 1, 1), embed_dims=(32, 32, 64, 64), groups=(1, 1, 2, 2))


def routed(size, stride, topk):
    return auto_grid(tuple(-(-n // stride) for n in size), topk)


@pytest.mark.parametrize(
    ('size', 'grids'),
    [
        ((224, 224), [(7, 7), (7, 7), (7, 7)]),
        ((512, 512), [(12, 12), (13, 13), (11, 11)]),
        ((2048, 2048), [(31, 31), (32, 32), (32, 32)]),
        ((800, 1344), [(16, 26), (15, 24), (17, 28)]),
        ((1344, 800), [(26, 16), (24, 15), (28, 17)]),
        ((1, 1), [(1, 1), (1, 1), (1, 1)]),
    ],
)
def test_known_values(size, grids):
    assert [routed(size, *stage) for stage in STAGES] == grids


def test_agents_get_the_published_grid_at_224():
    for stride, topk, tokens in AGENT_STAGES:
        keys = (224 // stride,) * 2
        assert auto_grid((keys[0] // tokens,) * 2, topk, keys) == (7, 7)


@pytest.mark.parametrize(('stride', 'topk'), STAGES)
def test_regions_grow_with_the_cube_root_of_the_area(stride, topk):
    for side in range(224, 8192, 100):
        rows, cols = routed((side, side), stride, topk)
        assert rows == cols
        exact = 7 * (side / 224) ** (2 / 3)
        # A region has a whole number of tokens a side; it is rounded once, the last row once more.
        tokens = side / stride / exact
        assert side / stride / (tokens + 0.5) - 0.01 <= rows <= side / stride / (tokens - 0.5) + 1


@pytest.mark.parametrize('topk', [1, 4, 8, 16, 49])
def test_any_map(topk):
    """Never an empty region, and topk of them wherever there are as many tokens."""
    for height in range(1, 41):
        for width in (*range(1, 41), 500):
            size = height, width
            grid = auto_grid(size, topk)
            assert math.prod(grid) >= min(topk, height * width)
            region = tuple(-(-n // parts) for n, parts in zip(size, grid, strict=True))
            assert num_regions(size, region) == grid


def outputs(net, x):
    """Maps and the gradients of all parameters."""
    net.zero_grad()
    outs = net(x)
    outs = outs if isinstance(outs, tuple) else (outs,)
    sum(out.sin().sum() for out in outs).backward()
    return [*outs, *(p.grad for p in net.parameters() if p.grad is not None)]


def assert_equal(net, explicit, x):
    explicit.load_state_dict(net.state_dict())
    found, expected = outputs(net, x), outputs(explicit, x)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize('padding', ['input', 'projected', 'mask'])
@pytest.mark.parametrize(('size', 'topk'), [((14, 14), 16), ((30, 41), 4), ((9, 5), 2)])
def test_equals_the_same_grid_given(padding, size, topk):
    x = torch.randn(2, *size, 32)
    auto, given = (
        BiLevelRoutingAttention(32, 2, topk, region_grid=grid, padding=padding)
        for grid in ('auto', auto_grid(size, topk))
    )
    assert_equal(auto, given, x)


@pytest.mark.parametrize('padding', ['input', 'mask'])
@pytest.mark.parametrize(('size', 'topk'), [((28, 28), 8), ((30, 41), 4), ((9, 13), 2)])
def test_agents_equal_the_same_grid_given(padding, size, topk):
    x = torch.randn(2, *size, 32)
    agents = tuple(-(-n // 2) for n in size)
    auto, given = (
        DeformableAgentAttention(32, 2, topk, 1, 2, 5, 14, region_grid=grid, padding=padding)
        for grid in ('auto', auto_grid(agents, topk, size))
    )
    assert_equal(auto, given, x)


@pytest.mark.parametrize(('model', 'arch'), [(BiFormer, BIFORMER), (DeBiFormer, DEBIFORMER)])
def test_backbones_at_224_equal_the_published_grid(model, arch):
    """Weights trained at 7x7 give the same maps to the last bit."""
    auto, given = (model(arch, region_grid=grid) for grid in ('auto', 7))
    assert_equal(auto.eval(), given.eval(), torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize(
    ('model', 'arch', 'padding'),
    [
        *((BiFormer, BIFORMER, padding) for padding in ('input', 'mask', 'projected')),
        *((DeBiFormer, DEBIFORMER, padding) for padding in ('input', 'mask')),
    ],
)
def test_all_sizes_from_one_pixel(model, arch, padding):
    net = model(arch, region_grid='auto', padding=padding).eval()
    assert net.min_size == (1, 1)
    with torch.no_grad():
        for size in [(1, 1), (1, 70), (5, 3), (33, 32), (64, 65), (97, 160), (129, 31)]:
            outs = net(torch.randn(1, 3, *size))
            for i, out in enumerate(outs):
                assert out.shape[2:] == tuple(-(-n // 2 ** (i + 2)) for n in size)
                assert out.isfinite().all()


def test_a_map_of_fewer_tokens_than_topk_attends_to_all():
    x = torch.randn(1, 2, 3, 32)
    auto = BiLevelRoutingAttention(32, 2, 16, region_grid='auto')
    one = BiLevelRoutingAttention(32, 2, 1, region_grid=1)
    one.load_state_dict(auto.state_dict())
    for a, b in zip(outputs(auto, x), outputs(one, x), strict=True):
        torch.testing.assert_close(a, b)  # the best regions come first: sums in another order


def test_graphs_are_of_one_size():
    layer = BiLevelRoutingAttention(32, 1, 4, region_grid='auto').eval()
    x = torch.randn(1, 30, 40, 32)
    sizes = ({1: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
    with pytest.raises(ValueError, match='cannot be exported for all of them; give region_grid'):
        torch.export.export(layer, (x,), dynamic_shapes=sizes)
    compiled = torch.compile(layer, fullgraph=True, backend='eager', dynamic=False)
    for size in ((30, 40), (29, 37)):
        x = torch.randn(1, *size, 32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))


def test_arguments():
    with pytest.raises(ValueError, match=r"region_grid='Auto' must be a positive int .* or 'auto'"):
        BiLevelRoutingAttention(32, 2, 1, region_grid='Auto')
    for layer in (
        lambda: BiLevelRoutingAttention(32, 2, 0, region_grid='auto'),
        lambda: DeformableAgentAttention(32, 2, 0, 1, 2, 5, 14, region_grid='auto'),
    ):
        with pytest.raises(ValueError, match='topk=0 must be positive'):
            layer()
    assert "region_grid='auto'" in repr(BiLevelRoutingAttention(32, 2, 1, region_grid='auto'))


@pytest.mark.parametrize(
    'layer',
    [
        BiLevelRoutingAttention(32, 2, 4, region_grid='auto'),
        DeformableAgentAttention(32, 2, 4, 1, 2, 5, 14, region_grid='auto'),
    ],
)
@torch.no_grad()
def test_compiles_for_each_size(layer):
    """Of sizes as symbols the rule would make terms that take minutes, or fail."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for width in (14, 21, 28):
        x = torch.randn(1, 14, width, 32)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 3  # with symbols there would be two
