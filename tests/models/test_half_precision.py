"""Training in half precision on inputs that are hard on it: no NaN appears."""

import pytest
import torch
from torch import nn

from mmbiformer.models import BiFormer

TOY = dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 32, 64), mlp_ratio=2, topks=(1, 2, 4, None))


def hot_region(x):
    x = 0.01 * x
    x[..., :8, :8] += 1000
    return x


HARD = {
    'large mean': lambda x: x + 200,
    'saturated': lambda x: 300 * x,
    'constant': lambda x: torch.full_like(x, 3.0),
    'hot region': hot_region,
}
both_halves = pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])


def mixture(x):
    """Another hard input for each image of four."""
    return torch.stack([change(image) for change, image in zip(HARD.values(), x, strict=True)])


def train(dtype, change, steps):
    """Train a toy backbone whose attention is saturated from the start, and check every step."""
    net = BiFormer(arch=TOY, region_grid=4).train()
    for name, parameter in net.named_parameters():
        if 'qkv.weight' in name:
            nn.init.normal_(parameter, std=2.0)  # logits of several hundreds
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for _ in range(steps):
        images = change(torch.randn(4, 3, 32, 32))
        with torch.autocast('cpu', dtype):
            outs = net(images)
        assert all(out.isfinite().all() for out in outs)
        loss = sum((out.float() - images.mean()).square().mean() for out in outs)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert all(value.isfinite().all() for value in net.state_dict().values())
    return losses


@pytest.mark.parametrize('change', [*HARD.values(), mixture], ids=[*HARD, 'mixture'])
@both_halves
def test_training_stays_finite(dtype, change):
    train(dtype, change, 5)


@pytest.mark.slow
@both_halves
def test_long_training_stays_finite(dtype):
    losses = train(dtype, mixture, 2000)
    assert sum(losses[-100:]) < sum(losses[:100])
