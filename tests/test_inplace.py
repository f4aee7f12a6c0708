"""Inference may reuse memory; nothing that is still needed may change."""

import pytest
import torch

from mmbiformer.layers.inplace import add, gelu
from mmbiformer.models import BiFormer, DeBiFormer

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
    add(x, branch).sum().backward()
    gelu(branch)
    assert torch.equal(branch, before)


@torch.no_grad()
def test_the_wider_type_wins():
    """Under autocast a branch is in half precision; the sum is not."""
    x, branch = torch.randn(2, 5), torch.randn(2, 5).bfloat16()
    assert add(x, branch).dtype == torch.float32
    assert torch.equal(add(x, branch), x + branch)
