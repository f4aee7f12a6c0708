"""From images to tokens: patches, convolutions, places."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmbiformer.layers import Tokenizer
from mmbiformer.layers.tokenizer import axis_code

KINDS = pytest.mark.parametrize('kind', ['patch', 'conv'])
STRIDES = pytest.mark.parametrize('stride', [4, 8, 16])


@pytest.mark.parametrize('count', [1, 3, 28, 200])
def test_code_of_places(count):
    """Sines at even channels, cosines at odd ones, of (i + 1) / (n + 1e-6) turns."""
    code = axis_code(count)
    assert code.dtype == torch.float32
    for i in range(count):
        angle = 2 * math.pi * (i + 1) / (count + 1e-6)
        for d in range(32):
            value = (math.cos if d % 2 else math.sin)(angle / 10000 ** (2 * (d // 2) / 32))
            assert code[i, d].item() == pytest.approx(value, abs=3e-6)


@STRIDES
@pytest.mark.parametrize('size', [(32, 48), (33, 1), (21, 50)])
def test_patches(stride, size):
    """Each token is one 16x16 patch around its stride, with zeros beyond the image."""
    layer = Tokenizer(3, 32, stride, 'patch').double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    tokens = layer(images)
    rows, columns = (-(-n // stride) for n in size)
    assert tokens.shape == (2, rows, columns, 32) and tokens.is_contiguous()
    margin = (16 - stride) // 2
    canvas = F.pad(images, (margin, 100, margin, 100))
    places = torch.cat(
        [
            axis_code(rows)[:, None].expand(-1, columns, -1),
            axis_code(columns).expand(rows, -1, -1),
        ],
        2,
    ).double()  # rows before columns
    for y in range(rows):
        for x in range(columns):
            patch = canvas[:, :, y * stride : y * stride + 16, x * stride : x * stride + 16]
            expected = patch.flatten(1) @ layer.proj.weight.flatten(1).T + layer.proj.bias
            torch.testing.assert_close(tokens[:, y, x], expected + layer.pos_proj(places[y, x]))


@KINDS
@STRIDES
@torch.no_grad()
def test_any_size(kind, stride):
    """The map is rounded up."""
    layer = Tokenizer(1, 32, stride, kind).eval()
    for side in range(1, 41):
        count = -(-side // stride)
        assert layer(torch.zeros(1, 1, side, 41 - side)).shape[1] == count
        assert layer(torch.zeros(1, 1, 3, side)).shape[1:] == (1, count, 32)


@STRIDES
def test_convolutions(stride):
    """Each halves the map, and is twice as wide as the one before; GELU between, no biases."""
    proj = Tokenizer(3, 64, stride, 'conv').proj
    widths = [64 >> i for i in reversed(range(int(math.log2(stride))))]
    kinds = [torch.nn.Sequential, torch.nn.GELU] * len(widths)
    assert [*map(type, proj)] == kinds[:-1]
    for (conv, norm), width, before in zip(proj[::2], widths, [3, *widths], strict=False):
        assert conv.weight.shape == (width, before, 3, 3)
        assert (conv.stride, conv.padding, conv.bias) == ((2, 2), (1, 1), None)
        assert (type(norm), norm.num_features) == (torch.nn.BatchNorm2d, width)


@KINDS
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_any_dtype_and_memory(kind, dtype):
    layer = Tokenizer(3, 32, 8, kind).eval()
    images = torch.randn(2, 3, 24, 40)
    expected = layer(images)
    torch.testing.assert_close(layer(images.to(memory_format=torch.channels_last)), expected)
    found = layer.to(dtype)(images.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    assert layer.to('meta')(images.to('meta', dtype)).shape == expected.shape


@pytest.mark.parametrize(('stride', 'kind'), [(2, 'patch'), (12, 'conv'), (8, 'linear')])
def test_arguments(stride, kind):
    with pytest.raises(ValueError, match=f'stride={stride} must be 4, 8 or 16, .*{kind}'):
        Tokenizer(3, 32, stride, kind)
