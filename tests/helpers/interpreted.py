"""Run the Triton kernels on CPU under Triton's interpreter: a process that test_triton starts.

Usage: TRITON_INTERPRET=1 python -m tests.helpers.interpreted FILE
"""

import contextlib
import sys

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmbiformer.models import BiFormer
from mmbiformer.ops import BACKENDS, routed_attention, schema
from mmbiformer.ops.backends.triton import launch
from tests.helpers import attention
from tests.helpers.attention import CASES, Case

# The cases of all backends, but smaller: the interpreter takes 30 ms for a program. For each way
# that the kernels take, one case has several images and heads.
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
# In half precision one case of each way. The interpreter does not know bfloat16.
HALF = [*BITWISE, 'plain', 'large regions', 'large regions, one route', 'head dim 24']
HALF += ['other keys, ragged', 'far below zero']
RUNS = [*((name, 'float32') for name in INTERPRETED), *((name, 'float16') for name in HALF)]


def inputs(name, dtype):
    """The tensors of a case; maps are slices of one tensor where they can be."""
    torch.manual_seed(0)
    case, dtype = INTERPRETED[name], getattr(torch, dtype)
    *maps, routes = case.tensors(dtype)
    if 'repeated' in name:
        routes[..., 1:3] = routes[..., :1]
    if name == 'far below zero':  # far below the logit 0 of keys that do not exist
        maps[:2] = maps[0].abs() * 16, -maps[1].abs() * 16
    if case.key is None and case.value_dim is None:
        maps = torch.cat(maps, -1).chunk(3, -1)
    cotangent = torch.randn(*maps[0].shape[:3], maps[2].shape[3]).to(dtype)
    return [*maps, routes], case.options(), cotangent


def attend(name, dtype):
    """Output and gradients by the kernels, on strided inputs."""
    tensors, options, cotangent = inputs(name, dtype)
    found, _ = attention.run(tensors, options, 'triton', cotangent)
    return [x.detach() for x in found]


def watch_launches():
    """Note every attention kernel that runs, and the way that it takes."""
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
    """Maps in half precision under autocast; gradients have the maps' type."""
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


def operator():
    """Its shapes, strides and gradients are as declared; a plain call goes past it."""
    for region, topk in (((2, 2), 4), ((4, 4), 1)):
        *maps, routes = Case(query=(4, 8), region=region, topk=topk, batch=1).tensors(torch.float32)
        maps = [x.requires_grad_() for x in maps]
        out = routed_attention(*maps, routes, num_heads=2, region_size=region)
        assert type(out.grad_fn).__name__ == '_FusedAttentionBackward'
        args = (*maps, routes, 2, region, region, 0.3, 'triton')
        torch.library.opcheck(schema.fused_attention, args)


def main():
    assert next(iter(BACKENDS)) == 'triton'
    torch.use_deterministic_algorithms(True)
    schema.unfilled_memory = contextlib.nullcontext
    assert torch.empty(3).isnan().all()  # so places that no kernel writes stay NaN
    ran, results = watch_launches(), {}
    for run in RUNS:
        ran.clear()
        found = attend(*run)
        launches = [*ran]
        again = attend(*run) if run[0] in BITWISE else found
        results[run] = found, launches, all(map(torch.equal, found, again))
    ran.clear()
    operator()
    graphs()
    assert ran
    amp()
    torch.save(results, sys.argv[1])


if __name__ == '__main__':
    main()
