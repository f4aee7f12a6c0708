"""Region-to-region routing (BiFormer, section 3.2, equations 1 to 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .regions import existing_tokens, num_regions, split_regions
from .tracing import always, exporting


def region_means(x: Tensor, region_size: tuple[int, int]) -> Tensor:
    """Describe each region by the mean of its tokens.

    Args:
        x: Map of shape (B, H, W, C).
        region_size: Height and width of a region, in tokens.

    Returns:
        Tensor: (B, R, C), in float32 or wider. Only tokens inside the map count.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    (height, width), (h, w) = x.shape[1:3], region_size
    rows, cols = num_regions((height, width), region_size)
    whole = always(rows * h == height) and always(cols * w == width)
    if whole and x.is_cuda and not exporting():
        # A GPU converts while it sums. On CPU, and for pooling, converting takes a copy.
        regions = x.view(len(x), rows, h, cols, w, x.shape[3])
        return regions.mean((2, 4), dtype=dtype).flatten(1, 2)
    x = x.to(dtype)
    if exporting():
        regions = split_regions(x, region_size)
        if whole:
            return regions.mean(2)
        return regions.sum(2) / existing_tokens(x.shape[1:3], region_size, x.device).sum(1)[:, None]
    x = x.permute(0, 3, 1, 2)
    size = [min(pair) for pair in zip(region_size, x.shape[2:], strict=True)]
    means = F.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False)
    return means.flatten(2).mT


@torch.no_grad()
def route_regions(
    query: Tensor,
    key: Tensor,
    topk: int,
    region_size: tuple[int, int],
    key_region_size: tuple[int, int] | None = None,
) -> Tensor:
    """Choose for each query region the k key regions of the highest affinity.

    The affinity of two regions is the dot product of their mean query and mean key. No gradient
    flows through the choice. It is made in float32 or wider, also under autocast: means in half
    precision would change routes.

    Args:
        query: (B, Hq, Wq, C).
        key: (B, Hk, Wk, C).
        topk: Regions to choose, k.
        region_size: Height and width of a query region, in tokens.
        key_region_size: Height and width of a key region, in tokens. Defaults to None, the
            same as ``region_size``.

    Returns:
        Tensor: int64, (B, Rq, k): the chosen key regions, by falling affinity.

    Raises:
        ValueError: If ``topk`` is below 1 or exceeds the number of key regions.
    """
    key_region_size = key_region_size or region_size
    rows, cols = num_regions(key.shape[1:3], key_region_size)
    if not 1 <= topk <= rows * cols:
        raise ValueError(
            f'topk={topk} does not fit the {rows * cols} regions ({rows}x{cols}) of a '
            f'{key.shape[1]}x{key.shape[2]} map; choose 1 <= topk <= {rows * cols}, a finer '
            f'region_grid or a larger input'
        )
    q, k = region_means(query, region_size), region_means(key, key_region_size)
    if q.device.type != 'meta' and torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            affinity = q @ k.mT
    else:
        affinity = q @ k.mT
    return affinity.topk(topk, dim=-1).indices
