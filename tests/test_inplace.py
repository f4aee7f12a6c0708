"""Inference may spare memory; nothing that is still needed, and no number, may change."""

import pytest
import torch

from mmbiformer.layers.inplace import add, gelu, reused_memory
from mmbiformer.models import BiFormer, DeBiFormer, hierarchical

TOY = dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 128, 256))


@pytest.mark.parametrize('net', [BiFormer(dict(TOY, mlp_ratio=2)), DeBiFormer(TOY)])
@torch.no_grad()
def test_inference_equals_training(net):
    net.eval()
    x = torch.randn(2, 3, 64, 96)
    before = x.clone()
    inference = net(x)
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
    with torch.no_grad():  # but of a backbone's own accord nothing is reused
        add(x, branch)
        gelu(branch)
    assert torch.equal(branch, before)
    with torch.no_grad(), reused_memory():
        assert add(x, branch) is branch
        assert gelu(branch) is branch


@torch.no_grad()
def test_the_wider_type_wins():
    """Under autocast a branch is in half precision; the sum is not."""
    x, branch = torch.randn(2, 5), torch.randn(2, 5).bfloat16()
    with reused_memory():
        assert add(x, branch).dtype == torch.float32
        assert torch.equal(add(x, branch), x + branch)


@pytest.mark.parametrize('net', [BiFormer(dict(TOY, mlp_ratio=2)), DeBiFormer(TOY)])
@torch.no_grad()
def test_a_few_images_at_a_time(net, monkeypatch):
    """Blocks see parts of a large batch; a hook in one of them sees it whole."""
    net.eval()
    x = torch.randn(5, 3, 64, 96)
    seen = []
    plain = hierarchical.Block.forward

    def note(block, x):
        seen.append(len(x))
        return plain(block, x)

    monkeypatch.setattr(hierarchical.Block, 'forward', note)
    whole = net(x)
    assert {*seen} == {5}

    seen.clear()
    monkeypatch.setattr(hierarchical, 'MAP_BYTES', 4 * 16 * 24 * 32 * 4)  # four of the first stage
    parts = net(x)
    depth = len(net.stages[0])
    assert seen[: 2 * depth] == [3] * depth + [2] * depth  # not four and one
    assert seen[-1] == 5  # in the last stage maps are smaller
    torch.testing.assert_close(parts, whole)

    seen.clear()
    hook = net.stages[0][-1].norm2.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(net(x), whole)
    assert {*seen[: len(net.stages[0])]} == {5}
    hook.remove()

    seen.clear()
    with torch.enable_grad():
        net(x)
    assert {*seen} == {5}


@pytest.mark.parametrize('net', [BiFormer(dict(TOY, mlp_ratio=2)), DeBiFormer(TOY)])
@pytest.mark.parametrize('everywhere', [False, True])
@torch.no_grad()
def test_hooks_may_keep_what_they_get(net, everywhere):
    """What a hook gets stays what it is when the net runs on, and so does what it puts in."""
    net.eval()
    x = torch.randn(2, 3, 64, 96)
    modules = [module for stage in net.stages for module in stage.modules()]

    def look():
        kept = []

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
        return kept

    kept = look()
    assert len(kept) > 50
    assert all(torch.equal(out, copy) for out, copy in kept)

    stored = net.stages[1][0].norm1(torch.randn(2, 8, 12, 64))
    hook = net.stages[1][0].attn.register_forward_hook(lambda *_: stored)
    first, second = net(x), net(x)
    hook.remove()
    assert all(map(torch.equal, first, second))


class Recorder(torch.nn.Module):
    """A user's wrapper, which keeps what the wrapped module or function gives."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = [wrapped]  # in a list, so that it is no submodule

    def forward(self, x):
        self.out = self.wrapped[0](x)
        self.before = self.out.clone()
        return self.out


@pytest.mark.parametrize('patched', [False, True])
@torch.no_grad()
def test_wrappers_may_keep_what_they_get(patched):
    net = BiFormer(dict(TOY, mlp_ratio=2)).eval()
    block = net.stages[0][0]
    if patched:
        recorder = Recorder(block.attn.forward)
        block.attn.forward = recorder.forward
    else:
        block.attn = recorder = Recorder(block.attn)
    net(torch.randn(2, 3, 64, 96))
    assert torch.equal(recorder.out, recorder.before)
