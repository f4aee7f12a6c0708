"""The router: forward hooks see the routes of every block, and nothing else changes."""

import pytest
import torch

from mmbiformer.layers import RegionRouter
from mmbiformer.models import BiFormer, DeBiFormer
from mmbiformer.ops import route_regions

ARCH = dict(depths=(1, 2, 1, 1), embed_dims=(32, 64, 64, 64), topks=(1, 2, 4, None))


@pytest.mark.parametrize(
    ('model', 'arch', 'shapes'),
    [
        (BiFormer, dict(ARCH, mlp_ratio=1), [(4, 1), (4, 2), (4, 2)]),
        # Blocks come in pairs: routed attention, then agents.
        (DeBiFormer, dict(ARCH, agent_topks=(3, 4, 4, 4)), [(4, 1), (4, 3), *[(4, 2), (4, 4)] * 2]),
    ],
)
@torch.no_grad()
def test_hooks_see_the_routes_of_every_block(model, arch, shapes):
    net = model(arch, region_grid=2, out_indices=(0, 1)).eval()
    x, seen = torch.randn(2, 3, 64, 96), []
    expected = net(x)

    def note(router, args, routes):
        query, key, *sizes = args
        seen.append(tuple(routes.shape[1:]))
        assert torch.equal(routes, route_regions(query, key, router.topk, *sizes))

    hooks = [
        module.register_forward_hook(note)
        for module in net.modules()
        if isinstance(module, RegionRouter)
    ]
    found = net(x)
    assert all(map(torch.equal, found, expected))
    assert seen == shapes
    for hook in hooks:
        hook.remove()
    assert all(map(torch.equal, net(x), expected))
    assert not any('router' in name for name in net.state_dict())


def test_a_small_map_may_have_fewer_regions():
    x = torch.randn(1, 2, 3, 8)
    assert RegionRouter(16, lower_topk=True)(x, x, (1, 1)).shape == (1, 6, 6)
    with pytest.raises(ValueError, match='topk=16 does not fit the 6 regions'):
        RegionRouter(16)(x, x, (1, 1))
