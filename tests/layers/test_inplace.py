"""Inference may reuse memory; no tensor that is still needed may change, and no result."""

import pytest
import torch

from mmbiformer.layers import inplace
from mmbiformer.layers.inplace import add, gelu, reused_memory
from mmbiformer.models import BiFormer, BiXT, DeBiFormer, hierarchical

TOY = dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 128, 256))
NETS = [BiFormer(dict(TOY, mlp_ratio=2)), DeBiFormer(TOY)]
BIXT = dict(dim=64, depth=5, num_latents=9, stride=8, layer_scale=0.5)
both_nets = pytest.mark.parametrize('net', NETS)
all_nets = pytest.mark.parametrize(
    'net', [*NETS, BiXT(BIXT), BiXT(BIXT, out_type='featmap', out_indices=(0, 2, 3))]
)


@all_nets
@torch.no_grad()
def test_inference_equals_training(net):
    x = torch.randn(2, 3, 64, 96)
    before = x.clone()
    inference = net.eval()(x)
    with torch.enable_grad():
        training = net(x)
    assert torch.equal(x, before)
    assert all(map(torch.equal, inference, training))


def test_gradients_keep_their_inputs():
    x, branch = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    before = branch.clone()
    with reused_memory():
        add(x, branch).sum().backward()
        gelu(branch)
    with torch.no_grad():  # nothing is reused unless a backbone allows it
        add(x, branch)
        gelu(branch)
    assert torch.equal(branch, before)
    with torch.no_grad(), reused_memory():
        assert add(x, branch) is branch
        assert gelu(branch) is branch
        # Under autocast a branch is in half precision; the sum is not.
        half = branch.bfloat16()
        assert torch.equal(add(x, half), x + half)


@both_nets
@torch.no_grad()
def test_a_few_images_at_a_time(net, monkeypatch):
    """Blocks see parts of a large batch; if one has a hook, all of its stage see it whole."""
    net.eval()
    x, seen, plain = torch.randn(5, 3, 64, 96), [], hierarchical.Block.forward

    def note(block, x):
        seen.append(len(x))
        return plain(block, x)

    def run():
        seen.clear()
        return net(x)

    monkeypatch.setattr(hierarchical.Block, 'forward', note)
    whole = run()
    assert {*seen} == {5}

    monkeypatch.setattr(inplace, 'MAP_BYTES', 4 * 16 * 24 * 32 * 4)  # four of the first stage
    parts, blocks = run(), sum(isinstance(m, hierarchical.Block) for m in net.stages[0].modules())
    assert seen[: 2 * blocks] == [3] * blocks + [2] * blocks  # not four and one
    assert seen[-1] == 5  # in the last stage maps are smaller
    torch.testing.assert_close(parts, whole)

    norms = [m for m in net.stages[0].modules() if isinstance(m, torch.nn.LayerNorm)]
    hook = norms[-1].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(run(), whole)
    assert {*seen[:blocks]} == {5}
    hook.remove()

    with torch.enable_grad():
        run()
    assert {*seen} == {5}


@all_nets
@pytest.mark.parametrize('everywhere', [False, True])
@torch.no_grad()
def test_hooks_may_keep_what_they_get(net, everywhere):
    x, kept = torch.randn(2, 3, 64, 96), []
    modules = [*net.eval().modules()]

    def keep(module, args, out):
        if module in modules and isinstance(out, torch.Tensor):
            kept.append((out, out.clone()))

    if everywhere:
        hooks = [torch.nn.modules.module.register_module_forward_hook(keep)]
    else:
        hooks = [module.register_forward_hook(keep) for module in modules]
    net(x)
    for hook in hooks:
        hook.remove()
    assert len(kept) > 50
    assert all(torch.equal(out, copy) for out, copy in kept)


@torch.no_grad()
def test_hooks_may_replace_an_output():
    """The tensor that a hook gives stays as it is."""
    net = BiFormer(dict(TOY, mlp_ratio=2)).eval()
    attention = next(m for m in net.stages[1].modules() if hasattr(m, 'qkv'))
    stored = torch.randn(2, 8, 12, 64)
    before = stored.clone()
    attention.register_forward_hook(lambda *_: stored)
    net(torch.randn(2, 3, 64, 96))
    assert torch.equal(stored, before)


class Recorder(torch.nn.Module):
    """A user's wrapper, which keeps the output of the wrapped module or function."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = [wrapped]  # in a list, so that it is not a submodule

    def forward(self, x):
        self.out = self.wrapped[0](x)
        self.before = self.out.clone()
        return self.out


@pytest.mark.parametrize('patched', [False, True])
@torch.no_grad()
def test_wrappers_may_keep_what_they_get(patched):
    net = BiFormer(dict(TOY, mlp_ratio=2)).eval()
    block = next(m for m in net.modules() if isinstance(m, hierarchical.Block))
    if patched:
        recorder = Recorder(block.attn.forward)
        block.attn.forward = recorder.forward
    else:
        block.attn = recorder = Recorder(block.attn)
    net(torch.randn(2, 3, 64, 96))
    assert torch.equal(recorder.out, recorder.before)
