"""Deformable agent attention as a layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmbiformer.layers import DeformableAgentAttention, deformable_agent


def layer(**kwargs):
    defaults = dict(
        num_heads=4, topk=3, num_groups=2, stride=2, offset_kernel=3, table_size=5, region_grid=3
    )
    return DeformableAgentAttention(32, **{**defaults, **kwargs}).double()


def test_agents_are_queries_of_the_one_routed_attention(monkeypatch):
    """Their regions are not the keys'."""
    calls = []

    def spy(q, k, v, routes, **kwargs):
        calls.append((q.shape[1:3], k.shape[1:3], kwargs['region_size'], kwargs['key_region_size']))
        return routed_attention(q, k, v, routes, **kwargs)

    routed_attention = deformable_agent.routed_attention
    monkeypatch.setattr(deformable_agent, 'routed_attention', spy)
    layer()(torch.randn(1, 10, 14, 32, dtype=torch.float64))
    assert calls == [((6, 9), (12, 15), (2, 3), (4, 5))]


@pytest.mark.parametrize('size', [(12, 18), (6, 6)])
def test_policies_agree_where_nothing_is_padded(size):
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    released, masked = layer(), layer(padding='mask')
    masked.load_state_dict(released.state_dict())
    torch.testing.assert_close(masked(x), released(x))


def test_mask_sees_no_padding():
    """Where one region is the whole map, a larger grid's padding must not matter."""
    x = torch.randn(2, 7, 5, 32, dtype=torch.float64)
    whole = layer(region_grid=1, topk=1)
    for padding, same in (('mask', True), ('input', False)):
        gridded = layer(region_grid=3, topk=9, padding=padding)
        gridded.load_state_dict(whole.state_dict())
        assert torch.allclose(gridded(x), whole(x)) == same


def test_one_offset_moves_agents_down_and_right():
    attention = layer(table_size=4)
    q = torch.zeros(1, 6, 6, 32, dtype=torch.float64)
    still = attention._positions(q)  # zero queries, zero offset
    nn.init.constant_(attention.offset.head.weight, 1.0)
    nn.init.constant_(attention.offset.norm.bias, 0.1)
    moved = attention._positions(q)
    assert still[0, 0, 0].tolist() == pytest.approx([1 / 3 - 1] * 4)
    step = 16 * F.gelu(torch.tensor(0.1)).item()
    assert moved[0, 0, 0].tolist() == pytest.approx([min(1 / 3 - 1 + step, 1)] * 4, rel=1e-6)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(num_heads=3), 'dim=32 must be a multiple of num_heads=3'),
        (dict(num_groups=3), 'num_groups=3'),
        (dict(offset_kernel=4), 'offset_kernel=4 must be an odd number'),
        (dict(stride=0), 'stride=0 must be positive'),
        (dict(table_size=1), 'table_size=1 2 or more'),
        (dict(padding='projected'), r"padding='projected' is unknown; choose one of \['input'"),
        (dict(topk=10), 'topk=10 does not fit the 9 regions'),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        layer(**kwargs)
