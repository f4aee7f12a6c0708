"""DeBiFormer compiled, and in mixed precision."""

import torch

from mmbiformer.models import DeBiFormer
from tests.helpers.backbones import ARCHS, toy

ARCH = ARCHS[DeBiFormer]


def test_autocast():
    """bfloat16 follows float32; positions, and the bias they read, stay in float32."""
    arch = dict(ARCH, topks=(1, 1, 1, None), agent_topks=(1, 1, 1, 1))
    net = toy(DeBiFormer, region_grid=1, arch=arch)
    x = torch.randn(2, 3, 64, 96)
    expected = [out.detach() for out in net(x)]
    with torch.autocast('cpu', torch.bfloat16):
        found = net(x)
    sum(out.float().square().sum() for out in found).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 0.05 * b.abs().max()


def test_compiles_to_one_graph():
    """Forwards and backwards, at a size that is padded."""
    two = dict(depths=(1, 1), strides=(8, 4), offset_kernels=(9, 7))
    net = toy(DeBiFormer, arch={key: value[:2] for key, value in ARCH.items()} | two).train()
    torch.compiler.reset()  # sizes seen in other tests would be symbols here, for minutes
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    x = torch.randn(1, 3, 36, 44)
    found, expected = compiled(x), net(x)
    params = list(net.parameters())
    grads = [
        torch.autograd.grad(sum(out.square().sum() for out in outs), params)
        for outs in (found, expected)
    ]
    for a, b in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
