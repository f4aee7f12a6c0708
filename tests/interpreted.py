"""Run the Triton kernels on CPU under Triton's interpreter; a process of its own for test_triton.

Usage: TRITON_INTERPRET=1 python tests/interpreted.py DTYPE FILE
"""

import contextlib
import sys

import torch
from test_ops import CASES, Case
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmbiformer.models import BiFormer
from mmbiformer.ops import BACKENDS, routed_attention, schema
from mmbiformer.ops.backends.triton import launch

# Those of all backends, but smaller: a program takes the interpreter 30 ms. Of each way that the
# kernels take, one has several images and heads.
INTERPRETED = {
    **CASES,
    'plain': Case(batch=1),
    'one route': Case(query=(4, 6), topk=1),
    'large regions': Case(query=(16, 16), region=(8, 8), topk=2, batch=1),
    'large regions, one route': Case(query=(16, 8), region=(8, 8), topk=1, batch=1, heads=1),
    'oblong': Case(query=(6, 20), region=(3, 5), topk=2, batch=1),
    'ragged': Case(query=(7, 9), region=(4, 5), topk=2),
    'ragged, one route': Case(query=(9, 15), region=(8, 8), topk=1, batch=1),
    'ragged, last row of one token': Case(query=(9, 8), region=(4, 4), topk=2, batch=1),
    'ragged, gathered': Case(query=(9, 15), region=(4, 5), topk=2, batch=1),
    'head dim 24': Case(query=(8, 8), region=(4, 4), topk=1, heads=3, head_dim=24, batch=1),
    'head dim 40': Case(query=(8, 8), region=(4, 4), head_dim=40, topk=2, batch=1),
    'head dim 100': Case(query=(8, 6), topk=2, heads=1, head_dim=100, batch=1),
    'other keys': Case((6, 6), (3, 3), key=(10, 14), key_region=(2, 7), topk=4, batch=1),
    'other keys, ragged': Case((7, 5), (3, 3), key=(11, 9), key_region=(4, 4), topk=2, batch=1),
    'other value width': Case(region=(4, 4), value_dim=12),
    'hub': Case(query=(8, 12), region=(4, 4), topk=2, hub=True, batch=1),
    'hub, ragged': Case(query=(7, 10), region=(4, 4), topk=2, hub=True, batch=1),
    'repeated': Case(query=(8, 12), region=(4, 4), topk=3, batch=1),
    'repeated, all routes': Case(query=(4, 8), topk=8, batch=1),
    'one image': Case(batch=1, query=(12, 12), region=(4, 4), topk=4, head_dim=32),
    'far below zero': Case(query=(10, 10), region=(5, 5), topk=1, batch=1),
}
BITWISE = ['hub', 'all routes', 'ragged, gathered']


def inputs(name, dtype):
    """The tensors of a case; maps are slices of one where they can be."""
    torch.manual_seed(0)
    case = INTERPRETED[name]
    *maps, routes = case.tensors(dtype)
    if 'repeated' in name:
        routes[..., 1:3] = routes[..., :1]
    if name == 'far below zero':  # where a key that does not exist, of logit 0, would be far above
        maps[:2] = maps[0].abs() * 16, -maps[1].abs() * 16
    if case.key is None and case.value_dim is None:
        maps = torch.cat(maps, -1).chunk(3, -1)
    cotangent = torch.randn(*maps[0].shape[:3], maps[2].shape[3]).to(dtype)
    return [*maps, routes], case.options(), cotangent


def attend(name, dtype):
    """Output and gradients by the kernels, on strided inputs."""
    (*maps, routes), options, cotangent = inputs(name, dtype)
    maps = [x.detach().requires_grad_() for x in maps]
    out = routed_attention(*maps, routes, **options, backend='triton')
    return [out.detach(), *torch.autograd.grad(out, maps, cotangent)]


def watch_launches():
    """Note the name of every attention kernel that runs, and which way is taken."""
    ran, plain = [], launch.Plan.launch

    def note(self, kernel, *args, **kwargs):
        name = kernel.fn.__name__
        one_region = self.tilings[name][2]['ONE_REGION']
        ran.append((name, self.all, self.one_pass, one_region))
        return plain(self, kernel, *args, **kwargs)

    launch.Plan.launch = note
    return ran


def backbone():
    torch.manual_seed(0)
    arch = dict(depths=(1,), embed_dims=(32,), mlp_ratio=1, topks=(2,))
    return BiFormer(arch, region_grid=2, padding='mask')


def gradients(net, x):
    """Output and gradients of a backbone."""
    outs = net(x)
    grads = torch.autograd.grad(sum(out.square().sum() for out in outs), list(net.parameters()))
    return [*outs, *grads]


def graphs():
    """The backbone in one graph, exported, checkpointed and in mixed precision."""
    net, x = backbone(), torch.randn(1, 3, 40, 32)
    expected = gradients(net, x)
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(gradients(compiled, x), expected)
    torch.testing.assert_close(compiled(x[..., :24]), net(x[..., :24]))

    net.with_cp = True
    torch.testing.assert_close(gradients(net, x.requires_grad_()), expected)
    net.with_cp = False

    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    net.eval()
    program = torch.export.export(net, (torch.randn(2, 3, 64, 64),), dynamic_shapes=(sizes,))
    assert 'fused_attention' in program.graph_module.code
    other = torch.randn(1, 3, 36, 52)
    torch.testing.assert_close(program.module()(other), net(other))


def amp():
    """Half-precision maps under autocast, and the gradients' type is that of the maps."""
    q, k, v, routes = Case(query=(4, 4), topk=2, batch=1).tensors(torch.float32)
    weight = nn.Parameter(torch.randn(16, 16))
    with torch.autocast('cpu', torch.float16):
        q, k, v = (x @ weight for x in (q, k, v))
        out = checkpoint(
            lambda *maps: routed_attention(*maps, num_heads=2, region_size=(2, 2)),
            *(q, k, v, routes),
            use_reentrant=False,
        )
    assert out.dtype == torch.float16
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


def main():
    dtype, path = getattr(torch, sys.argv[1]), sys.argv[2]
    torch.use_deterministic_algorithms(True)
    schema.unfilled_memory = contextlib.nullcontext
    assert torch.empty(3, dtype=dtype).isnan().all()  # what kernels do not write stays NaN
    ran = watch_launches()
    results = {'launches': {}, 'bitwise': {}}
    for name in INTERPRETED:
        ran.clear()
        results[name] = attend(name, dtype)
        results['launches'][name] = list(ran)
        if name in BITWISE:
            again = attend(name, dtype)
            results['bitwise'][name] = all(map(torch.equal, results[name], again))
    if dtype == torch.float32:
        for region, topk in (((2, 2), 4), ((4, 4), 1)):
            tensors = Case(query=(4, 8), region=region, topk=topk, batch=1).tensors(dtype)
            maps = [x.requires_grad_() for x in tensors[:3]]
            out = routed_attention(*tensors, num_heads=2, region_size=region)
            assert type(out.grad_fn).__name__ == '_FusedAttentionBackward'  # past torch.library
            torch.library.opcheck(
                schema.fused_attention, (*maps, tensors[3], 2, region, region, 0.3, 'triton')
            )
        assert next(iter(BACKENDS)) == 'triton'
        ran.clear()
        graphs()
        assert ran
    else:
        amp()
    torch.save(results, path)


if __name__ == '__main__':
    main()
