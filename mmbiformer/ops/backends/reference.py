"""The specification of routed attention, to be read beside the paper's equations 5 to 7.

For finite numbers every other backend must give the same output and gradients, in any dtype. (NaN
and infinity may reach further there than along the routes.)
"""

import torch
from torch import Tensor

from ..regions import existing_tokens, merge_regions, split_regions
from ..settings import Settings


def why_not(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> str | None:
    """The reference runs anything, anywhere."""
    return None


def attend(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, settings: Settings) -> Tensor:
    """See :func:`mmbiformer.ops.routed_attention`."""
    heads, region_size, key_region_size, scale = settings
    q = split_regions(query, region_size)  # (B, Rq, Tq, C)
    k = split_regions(key, key_region_size)  # (B, Rk, Tk, C)
    v = split_regions(value, key_region_size)
    exists = existing_tokens(key.shape[1:3], key_region_size, key.device)  # (Rk, Tk)

    # Equation 5: gather the tokens of the routed regions.
    image = torch.arange(routes.shape[0], device=routes.device)[:, None, None]
    k = k[image, routes].flatten(2, 3)  # (B, Rq, k * Tk, C)
    v = v[image, routes].flatten(2, 3)
    exists = exists[routes].flatten(2, 3)  # (B, Rq, k * Tk)

    # Equation 6: attend to them, head by head.
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(2, 3) for x in (q, k, v))
    logits = scale * q @ k.mT  # (B, Rq, heads, Tq, k * Tk)
    logits = logits.masked_fill(~exists[:, :, None, None], -torch.inf)
    out = logits.softmax(-1) @ v
    out = out.transpose(2, 3).flatten(3)  # (B, Rq, Tq, C)
    return merge_regions(out, query.shape[1:3], region_size)
