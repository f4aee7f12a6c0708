"""The hook that says where a NaN comes from."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import HOOKS

from mmbiformer.engine.hooks import CheckFiniteHook, NotFiniteError
from mmbiformer.errors import UserError
from mmbiformer.models import BiFormer

TOY = dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 32, 64), mlp_ratio=2, topks=(1, 2, 4, None))


def watched():
    net = BiFormer(arch=TOY, region_grid=4).train()
    hook = HOOKS.build(dict(type='mmbiformer.CheckFiniteHook'))
    assert type(hook) is CheckFiniteHook
    hook.before_train(SimpleNamespace(model=net, iter=41))
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
        (break_input, r'input of downsample_layers\.0\.0 is not finite, and no layer before'),
        (break_weight, r'iteration 42: weight of stages\.1\.0\.mlp\.fc2 is not finite since'),
        (break_layer, r'output of stages\.2\.0\.attn\.lepe is not finite, though its input is'),
    ],
)
def test_the_layer_is_named(damage, message):
    net, x = watched(), torch.randn(2, 3, 32, 64)
    net(x)
    damage(net, x)
    with pytest.raises(NotFiniteError, match=message) as info:
        net(x)
    assert isinstance(info.value, UserError)
    net.eval()(x)  # training only
