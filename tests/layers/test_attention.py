"""The attention layers: padding policies and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from mmbiformer.layers import BiLevelRoutingAttention, DeformableAgentAttention, FullAttention

PADDINGS = ['input', 'projected', 'mask']


def layer(padding='input', region_grid=4, topk=3, **kwargs):
    return BiLevelRoutingAttention(
        32, 2, topk, region_grid=region_grid, padding=padding, **kwargs
    ).double()


@pytest.mark.parametrize('size', [(16, 12), (4, 4), (8, 20), (9, 13)])
def test_policies_agree_exactly_if_nothing_is_padded(size):
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    layers = [layer(padding) for padding in PADDINGS]
    for other in layers[1:]:
        other.load_state_dict(layers[0].state_dict())
    outs = [other(x) for other in layers]
    assert all(out.shape == x.shape for out in outs)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        if size == (9, 13):
            assert (outs[i] - outs[j]).abs().max() > 1e-3
        else:
            torch.testing.assert_close(outs[i], outs[j])


@pytest.mark.parametrize('size', [(9, 13), (15, 6), (5, 7)])
def test_masking_attends_to_nothing_outside(size):
    """If every region is routed to, it is the same as attending to all tokens of the map."""
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    regions = [-(-n // -(-n // 4)) for n in size]
    masked = layer('mask', topk=regions[0] * regions[1])
    q, k, v = masked.qkv(x).chunk(3, -1)
    heads = [t.flatten(1, 2).unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads, scale=32**-0.5).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(masked(x), masked.proj(out + masked.lepe(v)))


def test_topk_beyond_the_map():
    """Masked, a small map has fewer regions than the grid: all of them are attended to."""
    x = torch.randn(1, 3, 5, 32, dtype=torch.float64)
    small = layer('mask', topk=16)
    exact = layer('mask', topk=9, region_grid=3)
    exact.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(x), exact(x))
    with pytest.raises(ValueError, match=r'topk=17 .* 16 regions \(4x4\) of a 4x4 map'):
        layer('projected', topk=17)(torch.zeros(1, 4, 4, 32, dtype=torch.float64))


def test_map_smaller_than_the_grid():
    x = torch.randn(1, 3, 9, 32, dtype=torch.float64)
    assert layer('input')(x).shape == x.shape
    with pytest.raises(ValueError, match='3x9 map is smaller than the 4x4 region grid'):
        layer('projected')(x)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(dim=30, num_heads=4), 'dim=30 must be a multiple of num_heads=4'),
        (dict(region_grid=0), 'region_grid=0 must be a positive int'),
        (dict(region_grid=(1, 2, 3)), 'must be a positive int or a pair'),
        (dict(region_grid='Auto'), "region_grid='Auto' must be a positive int .* or 'auto'"),
        (dict(topk=50), 'topk=50 .* 49 regions of a 7x7 grid.*finer region_grid'),
        (dict(topk=0, region_grid='auto'), 'topk=0 must be positive'),
        (dict(padding='zeros'), "padding='zeros' is unknown; choose one of"),
        (dict(backend='fast'), "backend='fast' is unknown; choose one of"),
    ],
)
@pytest.mark.parametrize('agents', [False, True])
def test_arguments(kwargs, message, agents):
    kwargs = dict(dim=32, num_heads=2, topk=1) | kwargs
    build = BiLevelRoutingAttention
    if agents:
        build = DeformableAgentAttention
        kwargs |= dict(num_groups=1, stride=2, offset_kernel=5, table_size=14)
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


@pytest.mark.parametrize('source', ['input', 'value'])
def test_full_attention(source):
    attn = FullAttention(32, num_heads=4, lepe_source=source).double()
    assert ('lepe.weight' in attn.state_dict()) == (source == 'input')
    x = torch.randn(2, 5, 3, 32, dtype=torch.float64)
    q, k, v = attn.qkv(x).chunk(3, -1)
    q, k, vh = (t.flatten(1, 2).unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v))
    out = (q @ k.mT * 8**-0.5).softmax(-1) @ vh
    lepe = attn.lepe(x) if source == 'input' else attn.value_lepe(v)
    expected = attn.proj(out.transpose(1, 2).reshape(x.shape) + lepe)
    torch.testing.assert_close(attn(x), expected)
