"""The neck that makes a pyramid of one map."""

import pytest
import torch
import torch.nn.functional as F

from mmbiformer.registry import MODELS


def neck(**kwargs):
    return MODELS.build(dict(type='MapPyramid', dim=8, **kwargs))


@pytest.mark.parametrize('size', [(8, 12), (9, 5), (1, 1)])
@pytest.mark.parametrize('scales', [(2, 1, 0.5, 0.25), (4, 0.125), [1]])
def test_sizes(scales, size):
    """Rounded up; every parameter learns; maps are contiguous, as RoIAlign takes them to be."""
    maps = [torch.randn(2, 8, *size)]
    net = neck(scales=scales)
    outs = net(maps)
    assert [tuple(out.shape[2:]) for out in outs] == [
        tuple(-int(-n * scale // 1) for n in size) for scale in scales
    ]
    for out in outs:
        torch.testing.assert_close(out.mean(1), torch.zeros_like(out[:, 0]), atol=1e-5, rtol=0)
        assert out.is_contiguous()
    sum(out.sin().sum() for out in outs).backward()
    assert all(p.grad is not None for p in net.parameters())
    for a, b in zip(outs, net(maps * len(scales)), strict=True):
        torch.testing.assert_close(a, b)


def test_values():
    x = torch.randn(1, 8, 5, 6)
    outs = neck(scales=(2, 1, 0.5))([x])
    torch.testing.assert_close(outs[1], F.layer_norm(x.movedim(1, 3), (8,), eps=1e-6).movedim(3, 1))
    edges = [slice(0, 2), slice(2, 4), slice(4, 6)]
    pooled = torch.stack([x[:, :, rows].amax(2) for rows in edges], 2)
    pooled = torch.stack([pooled[..., columns].amax(3) for columns in edges], 3)
    torch.testing.assert_close(
        outs[2], F.layer_norm(pooled.movedim(1, 3), (8,), eps=1e-6).movedim(3, 1)
    )


def test_arguments():
    for scale in (8, 3, 0.3, 0, -1, 1.5, float('nan')):
        with pytest.raises(ValueError, match=f'scale {scale} must be a power of 2, at most 4'):
            neck(scales=(1, scale))
    with pytest.raises(ValueError, match='zip'):
        neck()([torch.ones(1, 8, 4, 4)] * 2)
