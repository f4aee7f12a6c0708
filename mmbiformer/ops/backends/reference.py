"""The specification of routed attention, to be read beside the paper's equations 5 to 7.

Every other backend must give what this one gives for finite numbers: output and gradients, in any
dtype. (What is no number may reach further there than along the routes.)
"""

import torch
from torch import Tensor

from ..regions import existing_tokens, merge_regions, split_regions


def why_not(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> str | None:
    """The reference runs anything, anywhere."""
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_heads: int,
    region_size: tuple[int, int],
    key_region_size: tuple[int, int],
    scale: float,
) -> Tensor:
    """See :func:`mmbiformer.ops.routed_attention`."""
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
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(2, 3) for x in (q, k, v))
    logits = scale * q @ k.mT  # (B, Rq, heads, Tq, k * Tk)
    logits = logits.masked_fill(~exists[:, :, None, None], -torch.inf)
    out = logits.softmax(-1) @ v
    out = out.transpose(2, 3).flatten(3)  # (B, Rq, Tq, C)
    return merge_regions(out, query.shape[1:3], region_size)
