"""Which regions are routed to which, and how many regions a map is cut into."""

import math

import pytest
import torch

from mmbiformer.ops import auto_grid, num_regions, region_means, route_regions

# Strides of BiFormer's routed stages and the regions that each is routed to.
STAGES = [(4, 1), (8, 4), (16, 16)]


def test_region_means_count_what_exists():
    x = torch.arange(15.0).reshape(1, 3, 5, 1)
    means = region_means(x, (2, 2))
    expected = torch.tensor([3.0, 5.0, 6.5, 10.5, 12.5, 14.0]).reshape(1, 6, 1)
    torch.testing.assert_close(means, expected)


def test_routing_is_made_in_float32():
    x = torch.randn(1, 32, 32, 64, dtype=torch.bfloat16)
    means = region_means(x, (16, 16))
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, region_means(x.float(), (16, 16)))
    with torch.autocast('cpu', torch.bfloat16):
        routes = route_regions(x, x, 2, (16, 16))
    assert torch.equal(routes, route_regions(x.float(), x.float(), 2, (16, 16)))
    assert region_means(x.double(), (16, 16)).dtype == torch.float64


def test_routing_of_large_means():
    """The sums behind the means and affinities exceed float16; the routes are those of float32."""
    x = 200 + torch.randn(1, 32, 32, 64)
    x[:, :16, :16] += 100
    low = x.half()
    routes = [route_regions(each, each, 1, (16, 16)) for each in (low, low.float())]
    assert torch.equal(*routes)


def test_routing_by_affinity():
    q = torch.tensor([1.0, 0.0]).repeat(1, 4, 4, 1)
    k = torch.zeros(1, 4, 4, 2)
    k[:, :2, 2:, 0] = 1  # region 1
    k[:, 2:, :2, 0] = 2  # region 2
    assert route_regions(q, k, 2, (2, 2)).tolist() == [[[2, 1]] * 4]


@pytest.mark.parametrize('topk', [0, 17])
def test_topk_must_fit(topk):
    x = torch.zeros(1, 8, 8, 4)
    with pytest.raises(ValueError, match=rf'topk={topk} .* 16 regions .* choose 1 <= topk <= 16'):
        route_regions(x, x, topk, (2, 2))


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
def test_known_grids(size, grids):
    assert [routed(size, *stage) for stage in STAGES] == grids


def test_agents_get_the_published_grid_at_224():
    for stride, topk, tokens_per_agent in [(4, 4, 8), (8, 8, 4), (16, 16, 2), (32, 49, 1)]:
        keys = (224 // stride,) * 2
        assert auto_grid((keys[0] // tokens_per_agent,) * 2, topk, keys) == (7, 7)


@pytest.mark.parametrize(('stride', 'topk'), STAGES)
def test_regions_grow_with_the_cube_root_of_the_area(stride, topk):
    for side in range(224, 8192, 100):
        rows, cols = routed((side, side), stride, topk)
        assert rows == cols
        exact = 7 * (side / 224) ** (2 / 3)
        # A region has a whole number of tokens a side: it is rounded once, the last row once more.
        tokens = side / stride / exact
        assert side / stride / (tokens + 0.5) - 0.01 <= rows <= side / stride / (tokens - 0.5) + 1


@pytest.mark.parametrize('topk', [1, 4, 8, 16, 49])
def test_grid_of_any_map(topk):
    """No region is empty, and there are topk of them wherever there are as many tokens."""
    for height in range(1, 41):
        for width in (*range(1, 41), 500):
            size = height, width
            grid = auto_grid(size, topk)
            assert math.prod(grid) >= min(topk, height * width)
            region = tuple(-(-n // parts) for n, parts in zip(size, grid, strict=True))
            assert num_regions(size, region) == grid
