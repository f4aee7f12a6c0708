"""Numbers that are hard on half precision: no NaN appears, and where one comes from is said."""

import pytest
import torch
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.utils import digit_version
from torch import nn

from mmbiformer.engine import CheckFiniteHook, NotFiniteError
from mmbiformer.models import BiFormer
from mmbiformer.ops import route_regions, routed_attention

TOY = dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 32, 64), mlp_ratio=2, topks=(1, 2, 4, None))
HALVES = [torch.bfloat16, torch.float16]


def large_mean(x):
    return x + 200


def saturated(x):
    return 300 * x


def constant(x):
    return torch.full_like(x, 3.0)


def hot_region(x):
    x = 0.01 * x
    x[..., :8, :8] += 1000
    return x


def mixture(x):
    """A different one for each image of four."""
    return torch.stack([change(image) for change, image in zip(INPUTS[:-1], x, strict=True)])


INPUTS = [large_mean, saturated, constant, hot_region, mixture]


def train(dtype, change, steps):
    """Train a toy backbone whose attention is saturated from the start; look at every step."""
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


@pytest.mark.parametrize('change', INPUTS)
@pytest.mark.parametrize('dtype', HALVES)
def test_training_stays_finite(dtype, change):
    train(dtype, change, 5)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', HALVES)
def test_long_training_stays_finite(dtype):
    losses = train(dtype, mixture, 2000)
    assert sum(losses[-100:]) < sum(losses[:100])


@pytest.mark.xfail(
    digit_version(torch.__version__) < digit_version('2.5'),
    reason="torch 2.4's own attention on CPU overflows in float16",
)
@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('region', [(2, 2), (8, 8)])
def test_logits_beyond_half_precision(dtype, region):
    """Products of 16 numbers of 300 exceed 65504, where a matrix product in float16 overflows."""
    q, k, v = (300 * torch.randn(1, 16, 16, 32) for _ in range(3))
    assert (q[..., :16].flatten(0, 2) @ k[..., :16].flatten(0, 2).T).abs().max() > 65504
    maps = [x.to(dtype).requires_grad_() for x in (q, k, v / 300)]
    routes = route_regions(*maps[:2], 2, region)
    out = routed_attention(*maps, routes, num_heads=2, region_size=region)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in maps)


def test_routing_of_large_means():
    """The sums behind the means and affinities exceed float16; the routes are those of float32."""
    x = 200 + torch.randn(1, 32, 32, 64)
    x[:, :16, :16] += 100
    low = x.half()
    assert torch.equal(
        route_regions(low, low, 1, (16, 16)), route_regions(low.float(), low.float(), 1, (16, 16))
    )


class Runner:
    """What the hook needs of MMEngine's."""

    iter = 41

    def __init__(self, model):
        self.model = model


def watched():
    net = BiFormer(arch=TOY, region_grid=4).train()
    hook = MMENGINE_HOOKS.build(dict(type='mmbiformer.CheckFiniteHook'))
    assert type(hook) is CheckFiniteHook
    hook.before_train(Runner(net))
    return net


def break_input(net, x):
    x[1, 2, 3, 4] = float('nan')


def break_weight(net, x):
    net.stages[1][0].mlp.fc2.weight.data[0, 0] = float('nan')


def break_layer(net, x):
    def overflow(module, args, output):
        return output / 0

    net.stages[2][0].attn.lepe.register_forward_hook(overflow, prepend=True)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (break_input, r'input of downsample_layers\.0\.0 is not finite, which no layer'),
        (break_weight, r'iteration 42: weight of stages\.1\.0\.mlp\.fc2 is not finite: the update'),
        (break_layer, r'output of stages\.2\.0\.attn\.lepe is not finite, though its input is'),
    ],
)
def test_the_layer_is_named(damage, message):
    net, x = watched(), torch.randn(2, 3, 32, 64)
    net(x)
    damage(net, x)
    with pytest.raises(NotFiniteError, match=message):
        net(x)
    net.eval()(x)  # training only
