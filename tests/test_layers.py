"""The attention layers: padding policies and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmbiformer.layers import BiLevelRoutingAttention, FullAttention, conv
from mmbiformer.layers.conv import DepthwiseConv2d

PADDINGS = ['input', 'projected', 'mask']


def layer(padding='input', region_grid=4, topk=3, **kwargs):
    return BiLevelRoutingAttention(
        32, 2, topk, region_grid=region_grid, padding=padding, **kwargs
    ).double()


@pytest.mark.parametrize('size', [(16, 12), (4, 4), (8, 20)])
def test_policies_agree_where_nothing_is_padded(size):
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    layers = [layer(padding) for padding in PADDINGS]
    for other in layers[1:]:
        other.load_state_dict(layers[0].state_dict())
    expected = layers[0](x)
    assert expected.shape == x.shape
    for other in layers[1:]:
        torch.testing.assert_close(other(x), expected)


def test_policies_differ_where_something_is_padded():
    x = torch.randn(2, 9, 13, 32, dtype=torch.float64)
    layers = [layer(padding) for padding in PADDINGS]
    for other in layers[1:]:
        other.load_state_dict(layers[0].state_dict())
    outs = [other(x) for other in layers]
    assert all(out.shape == x.shape for out in outs)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (outs[i] - outs[j]).abs().max() > 1e-3


@pytest.mark.parametrize('size', [(9, 13), (15, 6), (5, 7)])
def test_masking_attends_to_nothing_outside(size):
    """The same as attending to all tokens of the map, when every region is routed to."""
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    regions = [-(-n // -(-n // 4)) for n in size]
    masked = layer('mask', topk=regions[0] * regions[1])
    q, k, v = masked.qkv(x).chunk(3, -1)
    heads = [t.flatten(1, 2).unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads, scale=32**-0.5).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(masked(x), masked.proj(out + masked.lepe(v)))


def test_scale_is_that_of_the_whole_width():
    assert layer().scale == 32**-0.5


def test_float32_and_bfloat16_follow_float64():
    x = torch.randn(2, 28, 28, 64, dtype=torch.float64)
    exact = BiLevelRoutingAttention(64, 2, 49).double()
    expected = exact(x)
    for dtype, unit in ((torch.float32, 2**-20), (torch.bfloat16, 2**-8)):
        low = BiLevelRoutingAttention(64, 2, 49).to(dtype)
        low.load_state_dict(exact.state_dict())
        found = low(x.to(dtype)).double()
        assert (found - expected).abs().max() <= 4 * unit * expected.abs().max()


def test_topk_beyond_the_grid():
    with pytest.raises(ValueError, match=r'topk=17 .* 16 regions of a 4x4 grid.*finer region_grid'):
        layer(topk=17)


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
        (dict(lepe_kernel=4), 'lepe_kernel=4 must be an odd'),
        (dict(padding='zeros'), "padding='zeros' is unknown; choose one of"),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BiLevelRoutingAttention(**{**dict(dim=32, num_heads=2, topk=1), **kwargs})


def test_pair_as_grid():
    x = torch.randn(1, 6, 10, 32, dtype=torch.float64)
    assert layer(region_grid=(2, 5), topk=10)(x).shape == x.shape


@pytest.mark.parametrize('source', ['input', 'value'])
def test_full_attention(source):
    attn = FullAttention(32, num_heads=4, lepe_source=source).double()
    x = torch.randn(2, 5, 3, 32, dtype=torch.float64)
    q, k, v = attn.qkv(x).chunk(3, -1)
    q, k, vh = (t.flatten(1, 2).unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v))
    out = (q @ k.mT * 8**-0.5).softmax(-1) @ vh
    lepe = attn.lepe(x if source == 'input' else v)
    expected = attn.proj(out.transpose(1, 2).reshape(x.shape) + lepe)
    torch.testing.assert_close(attn(x), expected)


@pytest.fixture
def pieces(monkeypatch):
    """A list of the shapes of maps whose convolution took its gradient in pieces."""
    shapes, plain = [], conv._kernel_gradient
    monkeypatch.setattr(
        conv,
        '_kernel_gradient',
        lambda grad, *args: shapes.append(grad.shape) or plain(grad, *args),
    )
    return shapes


def convolve(layer, x, cotangent):
    """Output and gradients of a map and the parameters."""
    x = x.detach().clone().requires_grad_()
    nchw = type(layer) is nn.Conv2d
    out = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if nchw else layer(x)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], cotangent)]


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('kernel', [3, 5, 7, 9])
@pytest.mark.parametrize('shape', [(2, 9, 7), (1, 1, 1), (3, 2, 14), (2, 5, 1), (4, 28, 28)])
def test_depthwise_convolution(shape, kernel, bias, pieces):
    """In and outside of pieces, also of a part of a packed map.

    A kernel's gradient is a running sum over all tokens; its roundings add up like a random walk.
    """
    layer = DepthwiseConv2d(32, kernel, bias=bias)
    x, cotangent = torch.randn(*shape, 96)[..., 64:], torch.randn(*shape, 32)
    own = nn.Conv2d(32, 32, kernel, padding=kernel // 2, groups=32, bias=bias)
    own.load_state_dict(layer.state_dict())
    exact = DepthwiseConv2d(32, kernel, bias=bias).double()
    exact.load_state_dict(layer.state_dict())

    found = convolve(layer, x, cotangent)
    assert len(pieces) == (kernel > 3)
    again = convolve(layer, x, cotangent)
    assert all(map(torch.equal, found, again))
    expected = convolve(exact, x.double(), cotangent.double())
    plain = convolve(own, x, cotangent)
    walk = (4 + x[..., 0].numel() ** 0.5) * 2**-24
    for a, b, c in zip(found, plain, expected, strict=True):
        budget = max(2 * (b - c).abs().max().item(), walk * c.abs().max().item())
        assert (a - c).abs().max().item() <= budget


def test_frozen_parts_of_a_depthwise_convolution(pieces):
    layer = DepthwiseConv2d(32, 5)
    x = torch.randn(2, 9, 7, 32)
    layer(x).sum().backward()  # the map needs no gradient
    expected = layer.weight.grad
    layer.weight.grad, layer.bias.requires_grad = None, False
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, expected)
    assert len(pieces) == 2
    layer.weight.requires_grad = False
    layer(x.requires_grad_()).sum().backward()
    with torch.autocast('cpu'):
        layer.requires_grad_()(x)[0].float().sum().backward()
    assert len(pieces) == 2


def test_autocast_leaves_the_backward_pass_alone():
    layer = DepthwiseConv2d(32, 5)
    x = torch.randn(2, 9, 7, 32, requires_grad=True)
    out = layer(x)
    wanted = [x, *layer.parameters()]
    expected = torch.autograd.grad(out.sum(), wanted, retain_graph=True)
    with torch.autocast('cpu'):
        found = torch.autograd.grad(out.sum(), wanted)
    assert all(map(torch.equal, found, expected))


def test_gradient_of_a_gradient_of_a_depthwise_convolution(pieces):
    layer = DepthwiseConv2d(32, 5)
    x = torch.randn(2, 9, 7, 32)

    def penalty(layer, x):
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), layer.weight)[0]

    found = penalty(layer, x)
    expected = penalty(layer.double(), x.double())
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
