"""The depthwise convolution: its gradient in pieces equals PyTorch's."""

import pytest
import torch
from torch import nn

from mmbiformer.layers import DepthwiseConv2d, conv


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
