"""Any map: the attention layers whatever the sizes, the memory layout and the options."""

from unittest import mock

import torch
from hypothesis import strategies as st

from mmbiformer.layers import BiLevelRoutingAttention, DeformableAgentAttention
from mmbiformer.ops import agents
from tests.helpers.attention import LAYOUTS, assert_close
from tests.helpers.properties import (
    GRIDS,
    MEMORY,
    backends_for,
    check_any,
    check_masked,
    counts,
    num_of,
    topks,
)


@st.composite
def routed_layers(draw, paddings=('input', 'projected', 'mask')):
    """A bi-level routing attention and its input."""
    grid, padding = draw(GRIDS), draw(st.sampled_from(paddings))
    least = (1, 1)
    if padding == 'projected':
        least = (grid, grid) if isinstance(grid, int) else grid
    return (
        dict(num_heads=2, topk=draw(topks(num_of(grid), 6)), region_grid=grid, padding=padding),
        draw(st.tuples(*(st.integers(n, 40) for n in least))),
        draw(st.integers(0, 2)),
        draw(MEMORY),
    )


def routed_layer(case):
    kwargs, size, batch, layout = case
    x = torch.randn(batch, *size, 8, dtype=torch.float64)
    return BiLevelRoutingAttention(8, **kwargs).double(), LAYOUTS[layout](x)


@st.composite
def agent_layers(draw, largest=24, paddings=('input', 'mask')):
    """A deformable agent attention, its input, and how far agents go: with 100 off the map."""
    grid = draw(GRIDS)
    return (
        dict(
            num_heads=4,
            topk=draw(topks(num_of(grid), 6)),
            num_groups=draw(st.sampled_from([1, 2, 4])),
            stride=draw(st.integers(1, 9)),
            offset_kernel=draw(st.sampled_from([1, 3, 5, 9])),
            table_size=draw(st.integers(2, 9)),
            mlp_ratio=draw(st.sampled_from([1, 1.5])),
            region_grid=grid,
            padding=draw(st.sampled_from(paddings)),
        ),
        draw(st.tuples(st.integers(1, largest), st.integers(1, largest))),
        draw(st.integers(0, 3)),
        draw(MEMORY),
        draw(st.sampled_from([0.0, 1.0, 100.0])),
    )


def agent_layer(case):
    kwargs, size, batch, layout, reach = case
    attn = DeformableAgentAttention(8, **kwargs).double()
    with torch.no_grad():
        attn.offset.head.weight.mul_(reach)
    return attn, LAYOUTS[layout](torch.randn(batch, *size, 8, dtype=torch.float64))


def outputs(attn, x):
    """Output, and the gradients of the map and the parameters."""
    leaf = x.detach().requires_grad_()
    out = attn(leaf)
    assert out.shape == x.shape and out.isfinite().all()
    return [out, *torch.autograd.grad(out.square().sum(), [leaf, *attn.parameters()])]


def check_routed(case):
    """Backends agree to the last digits of float64, also in gradients."""
    attn, x = routed_layer(case)
    attn.backend = 'reference'
    expected = outputs(attn, x)
    for attn.backend in backends_for(x)[:-1]:
        assert_close(outputs(attn, x), expected, 1e-9)


def check_agents(case):
    """The same; and an image is alone in its batch, whose logits may be held row by row."""
    attn, x = agent_layer(case)
    attn.backend = 'reference'
    expected = outputs(attn, x)
    for attn.backend in backends_for(x)[:-1]:
        assert_close(outputs(attn, x), expected, 1e-9)
    with mock.patch.object(agents, 'LOGITS_ON_CPU', 1):
        assert_close(outputs(attn, x), expected, 1e-9)
    if len(x):
        assert_close([attn(x[:1])], [expected[0][:1]], 1e-9)


@counts(60)
def test_routed_attention(count):
    check_any(count, check_routed, routed_layers())


@counts(30, 150)
def test_agents(count):
    check_any(count, check_agents, agent_layers(24 if count < 100 else 48))


@counts(40)
def test_masked_padding_has_no_influence(count):
    """Whatever lies beyond the edge."""
    check_any(
        count,
        lambda case, value: check_masked(*routed_layer(case), value),
        routed_layers(['mask']),
        st.floats(-1e6, 1e6),
    )


@counts(20)
def test_agents_see_no_masked_padding(count):
    check_any(
        count,
        lambda case, value: check_masked(*agent_layer(case), value),
        agent_layers(paddings=['mask']),
        st.floats(-1e6, 1e6),
    )
