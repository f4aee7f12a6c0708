"""The backbone as a graph: compiled whole, exported for all sizes, recomputed, in mixed precision.

These run the attention for CPU; tests/helpers/interpreted.py repeats some with the Triton kernels.
"""

import functools

import pytest
import torch
from torch.export import Dim

from mmbiformer.models import BiFormer

PADDINGS = ['input', 'projected', 'mask']


def backbone(topks, padding='input', **kwargs):
    torch.manual_seed(0)
    arch = dict(depths=(1, 1), embed_dims=(32, 32), mlp_ratio=1, topks=topks)
    return BiFormer(arch, region_grid=3, padding=padding, **kwargs)


def gradients(net, x, without=()):
    """Outputs, and the gradients of the parameters as one vector, without some of them."""
    outs = net(x)
    loss = sum(out.float().sin().sum() for out in outs)
    chosen = [param for name, param in net.named_parameters() if name not in without]
    grads = torch.autograd.grad(loss, chosen)
    return [*outs, torch.cat([grad.flatten() for grad in grads])]


def assert_close(found, expected, tolerance=1e-5):
    """Equal up to rounding, which another order of sums changes."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize('backend', ['auto', 'sdpa'])
@pytest.mark.parametrize('padding', ['input', 'mask'])
def test_compiles_to_one_graph(padding, backend):
    # By sdpa regions are gathered, then all tokens meet under a mask.
    net = backbone((1, 9), padding, backend=backend)
    torch.compiler.reset()  # PyTorch takes nets of one class together, and 8 graphs at most
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    x = torch.randn(1, 3, 101, 120)
    assert_close(gradients(compiled, x), gradients(net, x))
    with torch.no_grad():
        assert_close(compiled(x), net(x))


def test_compiled_graphs_hold_the_fused_attention():
    """And nothing that only graphs for all sizes need; sizes change, and become symbols."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module.code)
        return module

    net = backbone((1, 4))
    torch.compiler.reset()  # sizes seen in other tests would be symbols from the start
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for height, width in ((96, 96), (101, 120), (131, 96)):
        x = torch.randn(1, 3, height, width)
        assert_close(compiled(x), net(x))
    assert len(graphs) > 1
    for code in graphs:
        assert code.count('mmbiformer.fused_attention') == 2
        assert 'index_select' not in code


@functools.cache  # an export for all sizes takes long
def exported(padding, any_size):
    net = backbone((2, None), padding).eval()
    sizes = {0: Dim.DYNAMIC} | (dict.fromkeys((2, 3), Dim.DYNAMIC) if any_size else {})
    return net, torch.export.export(net, (torch.randn(2, 3, 96, 192),), dynamic_shapes=(sizes,))


@pytest.mark.parametrize('padding', PADDINGS)
def test_exports_for_all_sizes(padding):
    net, program = exported(padding, True)
    graph = program.module()
    for batch, height, width in ((1, 128, 128), (2, 96, 224), (3, 203, 131), (1, 100, 400)):
        x = torch.randn(batch, 3, height, width)
        assert_close(graph(x), net(x))


@pytest.mark.parametrize(
    ('padding', 'any_size', 'masks', 'pads'),
    [
        ('input', False, False, False),
        ('mask', False, False, False),
        ('input', True, False, True),
        ('mask', True, True, True),
    ],
)
def test_exported_graphs_mask_only_what_can_lie_outside(padding, any_size, masks, pads):
    _, program = exported(padding, any_size)
    used = {str(node.target) for node in program.graph.nodes}
    assert ('aten.masked_fill.Scalar' in used, 'aten.pad.default' in used) == (masks, pads)


@pytest.mark.parametrize('strict', [False, True])
def test_exported_graphs_run_without_this_project(strict):
    net = backbone((1, 4)).eval()
    x = torch.randn(1, 3, 96, 96)
    program = torch.export.export(net, (x,), strict=strict)
    assert 'mmbiformer' not in program.graph_module.code
    assert_close(program.module()(x), net(x))


def test_mixed_precision():
    # On CPU PyTorch sums the gradient of a LayerNorm's bias in bfloat16, 12 % off on one thread.
    without = ('norm0.bias', 'norm1.bias')
    net, x = backbone((1, 9)), torch.randn(1, 3, 96, 80)
    expected = gradients(net, x, without)
    with torch.autocast('cpu', torch.bfloat16):
        found = gradients(net, x, without)
    assert_close(found, expected, tolerance=0.05)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('trainable', [False, True])
def test_traces(trainable):
    net = backbone((1, 9)).eval().requires_grad_(trainable)
    traced = torch.jit.trace(net, torch.randn(1, 3, 96, 80))
    x = torch.randn(1, 3, 96, 80)
    assert_close(traced(x), net(x))


def test_gradients_of_each_image():
    """By torch.func, as differential privacy asks for them."""
    net = backbone((1, 9)).eval().requires_grad_(False)
    weights = {name: param.double() for name, param in net.named_parameters()}
    x = torch.randn(3, 3, 96, 80, dtype=torch.float64)
    net.double()

    def loss(weights, image):
        outs = torch.func.functional_call(net, weights, (image[None],))
        return sum(out.sin().sum() for out in outs)

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i, image in enumerate(x):
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        expected = torch.autograd.grad(loss(leaves, image), [*leaves.values()])
        for name, grad in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found[name][i], grad)
