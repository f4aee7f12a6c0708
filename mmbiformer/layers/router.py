"""Region-to-region routing as a module, so that hooks can see it."""

import math

from torch import Tensor, nn

from ..ops import num_regions, route_regions


class RegionRouter(nn.Module):
    """Chooses for each query region the key regions that it is routed to.

    It has no parameters and no buffers. It is a module so that a forward hook sees the queries,
    keys and routes of a block::

        def note(router, args, routes):
            query, key, *_ = args
            print(router, query.shape, routes.shape)

        for module in net.modules():
            if isinstance(module, RegionRouter):
                module.register_forward_hook(note)

    Args:
        topk: Regions each region is routed to, k.
        lower_topk: Whether a map with fewer regions than ``topk`` is routed to all of them.
            Otherwise such a map is an error. Defaults to False.
    """

    def __init__(self, topk: int, lower_topk: bool = False) -> None:
        super().__init__()
        self.topk = topk
        self.lower_topk = lower_topk

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        region_size: tuple[int, int],
        key_region_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """See :func:`mmbiformer.ops.route_regions`."""
        topk = self.topk
        if self.lower_topk:
            regions = num_regions(key.shape[1:3], key_region_size or region_size)
            topk = min(topk, math.prod(regions))
        return route_regions(query, key, topk, region_size, key_region_size)

    def extra_repr(self) -> str:
        return f'topk={self.topk}'
