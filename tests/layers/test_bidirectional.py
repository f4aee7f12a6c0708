"""The layer in which latents and tokens attend to each other, both ways and one way."""

import pytest
import torch

from mmbiformer.layers import BidirectionalCrossAttention
from mmbiformer.ops import bidirectional_attention

SIDES = [(True, True), (True, False), (False, True)]
sides = pytest.mark.parametrize(('to_latents', 'to_tokens'), SIDES)


def inputs(dtype=torch.float64):
    return torch.randn(2, 5, 64, dtype=dtype), torch.randn(2, 3, 7, 64, dtype=dtype)


@pytest.mark.parametrize('backend', ['auto', 'sdpa', 'reference'])
@sides
def test_definition(to_latents, to_tokens, backend):
    """Projections give references, then values; one side alone is the same as of both."""
    layer = BidirectionalCrossAttention(64, 2, to_latents, to_tokens, backend).double()
    latents, tokens = inputs()
    if to_tokens:
        latent_r, latent_v = layer.rv_latents(latents).split(64, -1)
    else:
        latent_r = latent_v = layer.r_latents(latents)
    token_r, token_v = layer.rv_tokens(tokens).flatten(1, 2).split(64, -1)
    expected = bidirectional_attention(
        latent_r, latent_v, token_r, token_v, num_heads=2, backend='reference'
    )
    found = layer(latents, tokens)
    assert [out is not None for out in found] == [to_latents, to_tokens]
    if to_latents:
        torch.testing.assert_close(found[0], layer.proj_latents(expected[0]))
    if to_tokens:
        torch.testing.assert_close(found[1], layer.proj_tokens(expected[1]).view(tokens.shape))


@sides
def test_parameters(to_latents, to_tokens):
    """Those that the authors' layers have; each has a use."""
    layer = BidirectionalCrossAttention(64, 2, to_latents, to_tokens)
    expected = {'rv_tokens': 128, 'rv_latents' if to_tokens else 'r_latents': 64 + 64 * to_tokens}
    expected |= {'proj_latents': 64} if to_latents else {}
    expected |= {'proj_tokens': 64} if to_tokens else {}
    assert {name: part.out_features for name, part in layer.named_children()} == expected
    outs = layer(*inputs(torch.float32))
    sum(out.square().sum() for out in outs if out is not None).backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_arguments():
    with pytest.raises(ValueError, match='dim=60 must be a multiple of num_heads=8'):
        BidirectionalCrossAttention(60, 8)
    with pytest.raises(ValueError, match='num_heads=0'):
        BidirectionalCrossAttention(60, 0)
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        BidirectionalCrossAttention(64, 2, backend='fast')
    layer = BidirectionalCrossAttention(96, 2, backend='cpp').double()
    with pytest.raises(RuntimeError, match="'cpp' cannot run here: a tensor is torch"):
        layer(torch.ones(1, 2, 96).double(), torch.ones(1, 2, 2, 96).double())
