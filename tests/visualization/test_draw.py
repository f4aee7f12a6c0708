"""Where regions and tokens are in an image."""

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from mmbiformer.models import BiXT, DeBiFormer
from mmbiformer.visualization import record
from mmbiformer.visualization.draw import draw_routes, draw_weights, token_at
from tests.helpers.backbones import toy


def boxes(axes):
    """Left, top, right and bottom of all rectangles; the query region's is the last."""
    found = [patch.get_bbox().extents.tolist() for patch in axes.patches]
    return [tuple(map(round, box)) for box in found]


@pytest.mark.parametrize(('index', 'box'), [(0, (48, 32, 64, 48)), (2, (48, 32, 64, 48))])
@torch.no_grad()
def test_regions_of_a_padded_map(index, box):
    """64x64 pixels: maps of 16, 8 and 4 tokens a side, in 4 regions a side."""
    net = toy(region_grid=4).eval()
    image = np.full((64, 64, 3), 128.0)
    with record(net) as seen:
        net(torch.randn(1, 3, 64, 64))
    stages = {block.name.split('.')[1]: block for block in seen.routed}
    block = stages[str(index)]
    axes = plt.figure().gca()
    draw_routes(axes, image, block, 0, (60, 40))
    assert boxes(axes)[-1] == box
    assert all(0 <= a <= c <= 64 and 0 <= b <= d <= 64 for a, b, c, d in boxes(axes))
    y, x = token_at(image, block, (60, 40))
    assert (y, x) == (40 // (4 << index), 60 // (4 << index))
    plt.close('all')


@torch.no_grad()
def test_stride_of_a_map_that_is_padded_to_twice_its_size():
    """64x64 pixels make 4x4 tokens of 16 pixels, padded to 7x7 for 7 regions a side."""
    net = toy(region_grid=7).eval()
    with record(net) as seen:
        net(torch.randn(1, 3, 64, 64))
    block = next(block for block in seen.routed if block.name.startswith('stages.2.'))
    assert block.key.shape[1:3] == (7, 7)
    axes = plt.figure().gca()
    draw_routes(axes, np.zeros((64, 64, 3)), block, 0, (60, 40))
    assert boxes(axes)[-1] == (48, 32, 64, 48)
    plt.close('all')


@torch.no_grad()
def test_agents_stand_for_several_tokens():
    net = toy(DeBiFormer, region_grid=2).eval()
    image = np.zeros((128, 128, 3))
    with record(net) as seen:
        net(torch.randn(1, 3, 128, 128))
    strided = [block for block in seen.routed if block.query_stride > 1]
    assert strided
    for block in strided:
        axes = plt.figure().gca()
        draw_routes(axes, image, block, 0, (127, 1))
        assert boxes(axes)[-1] == (64, 0, 128, 64)
    plt.close('all')


@torch.no_grad()
def test_maps_of_latents():
    net = toy(BiXT).eval()  # a token every 8 pixels
    with record(net) as seen:
        net(torch.randn(1, 3, 60, 92))
    axes = plt.figure().gca()
    draw_weights(axes, np.zeros((60, 92, 3)), seen.exchanges[0].maps(0)[0, 0].numpy(), 'blocks.0')
    assert axes.images[-1].get_extent() == [0, 96, 64, 0]
    plt.close('all')
