"""Records routes, agents and latents while a model runs.

Example:
    >>> import torch
    >>> from mmbiformer.models import BiFormer
    >>> from mmbiformer.visualization import record
    >>> net = BiFormer('tiny').eval()
    >>> with record(net) as seen, torch.no_grad():
    ...     maps = net(torch.randn(1, 3, 224, 224))
    >>> block = seen.routed[-1]
    >>> block.name, tuple(block.routes.shape), block.query_grid
    ('stages.2.7.attn', (1, 49, 16), (7, 7))
    >>> tuple(block.attention(0, y=3, x=5).shape)  # of one token, by head
    (8, 14, 14)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..layers import (
    BidirectionalCrossAttention,
    BiLevelRoutingAttention,
    DeformableAgentAttention,
    RegionRouter,
)
from ..ops import num_regions
from ..ops.regions import pad_to
from ..ops.routing import region_means

Routed = BiLevelRoutingAttention | DeformableAgentAttention


@dataclass
class RoutedBlock:
    """One bi-level routing attention. Tensors are those of the model; they are not copied.

    Attributes:
        name: Name of the attention in the model.
        query: (B, Hq, Wq, C): the tokens' queries, or the agents' in DeBiFormer.
        key: (B, Hk, Wk, C).
        routes: The key regions of each query region, by falling affinity, (B, Rq, k).
        region_size: Height and width of a query region, in tokens.
        key_region_size: The same of a key region.
        num_heads: Number of heads.
        scale: Factor on the logits.
        positions: DeBiFormer's agents as they were sampled, (B, Ha, Wa, G, 2): down and to the
            right, from -1 to 1 over the map with what pads it. None for BiFormer.
        query_stride: Tokens of the map from one query to the next: more than 1 for agents.
    """

    name: str
    query: Tensor
    key: Tensor
    routes: Tensor
    region_size: tuple[int, int]
    key_region_size: tuple[int, int]
    num_heads: int
    scale: float
    positions: Tensor | None = None
    query_stride: int = 1

    @property
    def query_grid(self) -> tuple[int, int]:
        """Rows and columns of query regions."""
        return num_regions(self.query.shape[1:3], self.region_size)

    @property
    def key_grid(self) -> tuple[int, int]:
        """Rows and columns of key regions."""
        return num_regions(self.key.shape[1:3], self.key_region_size)

    @property
    def affinity(self) -> Tensor:
        """Products of the means of all query and key regions, (B, Rq, Rk)."""
        query = region_means(self.query, self.region_size)
        return query @ region_means(self.key, self.key_region_size).mT

    def region(self, y: int, x: int) -> int:
        """The query region of a token."""
        return y // self.region_size[0] * self.query_grid[1] + x // self.region_size[1]

    def reached(self, image: int, y: int, x: int) -> Tensor:
        """The tokens that a query token attends to, (Hk, Wk), bool."""
        chosen = torch.zeros(self.key_grid, dtype=torch.bool, device=self.key.device)
        chosen.view(-1)[self.routes[image, self.region(y, x)]] = True
        for axis, size in enumerate(self.key_region_size):
            chosen = chosen.repeat_interleave(size, axis)
        return chosen[: self.key.shape[1], : self.key.shape[2]]

    def attention(self, image: int, y: int, x: int) -> Tensor:
        """How much a query token attends to each token, by the reference formula.

        Args:
            image: Number in the batch.
            y: Row of the token.
            x: Its column.

        Returns:
            Tensor: (heads, Hk, Wk); each head sums to 1, and is 0 where the token is not routed to.
        """
        query = self.query[image, y, x].detach().float().unflatten(0, (self.num_heads, -1))
        key = self.key[image].detach().float().unflatten(2, (self.num_heads, -1))
        logits = self.scale * torch.einsum('hc,yxhc->hyx', query, key)
        logits = logits.masked_fill(~self.reached(image, y, x), -torch.inf)
        return logits.flatten(1).softmax(1).view_as(logits)

    def popularity(self, image: int) -> Tensor:
        """How many query regions route to each key region, (rows, columns)."""
        counts = torch.bincount(self.routes[image].flatten(), minlength=self.affinity.shape[2])
        return counts.view(self.key_grid)


@dataclass
class LatentBlock:
    """One exchange of latents and tokens in a BiXT.

    Attributes:
        name: Name of the attention in the model.
        latents: What comes in, (B, N, C).
        tokens: (B, H, W, C).
        module: The attention.
    """

    name: str
    latents: Tensor
    tokens: Tensor
    module: BidirectionalCrossAttention

    @torch.no_grad()
    def maps(self, image: int) -> Tensor:
        """How much each latent attends to each token, (heads, N, H, W)."""
        module, tokens = self.module, self.tokens[image : image + 1]
        latents = self.latents[image : image + 1]
        token_r = module.rv_tokens(tokens).chunk(2, -1)[0]
        latent_r = (
            module.rv_latents(latents).chunk(2, -1)[0]
            if module.to_tokens
            else module.r_latents(latents)
        )
        heads = module.num_heads
        query = latent_r[0].float().unflatten(1, (heads, -1))
        key = token_r[0].float().unflatten(2, (heads, -1))
        logits = query.shape[2] ** -0.5 * torch.einsum('nhc,yxhc->hnyx', query, key)
        return logits.flatten(2).softmax(2).view_as(logits)


@dataclass
class Record:
    """The attentions of a model, in the order of their calls.

    Attributes:
        routed: Bi-level routing attentions.
        exchanges: BiXT's exchanges of latents and tokens.
    """

    routed: list[RoutedBlock] = field(default_factory=list)
    exchanges: list[LatentBlock] = field(default_factory=list)


@contextmanager
def record(model: nn.Module) -> Iterator[Record]:
    """Record what the attentions inside a model do while the context lasts.

    Outputs are the same to the last bit. What is recorded keeps queries and keys alive.

    Args:
        model: A backbone of this package, or anything around one: a classifier, segmentor or
            detector of the hosts, or timm's model. It is not compiled.

    Yields:
        Record: Filled as the model runs.
    """
    seen, undo = Record(), []
    for name, module in model.named_modules():
        if isinstance(module, BiLevelRoutingAttention | DeformableAgentAttention):
            undo += _watch_routes(seen, name, module)
        elif isinstance(module, BidirectionalCrossAttention):
            undo.append(_watch_latents(seen, name, module))
    try:
        yield seen
    finally:
        for each in undo:
            each()


def _watch_routes(seen: Record, name: str, module: Routed) -> list:
    positions: list[Tensor] = []

    def note(router: RegionRouter, args: tuple, routes: Tensor) -> None:
        query, key, size, *rest = args
        key_size = rest[0] if rest else size
        if module.padding == 'projected':  # attends to zeros around the map as well
            rows, cols = num_regions(query.shape[1:3], size)
            query, key = (pad_to(x, rows * size[0], cols * size[1]) for x in (query, key))
        where = positions.pop() if positions else None
        seen.routed.append(
            RoutedBlock(
                name,
                query,
                key,
                routes,
                tuple(size),
                tuple(key_size),
                module.num_heads,
                module.scale,
                where,
                1 if where is None else module.stride,
            )
        )

    undo = [module.router.register_forward_hook(note).remove]
    if isinstance(module, DeformableAgentAttention):
        whole = module._positions

        def keep(query: Tensor) -> Tensor:
            found = whole(query)
            positions.append(found.detach().unflatten(-1, (module.num_groups, 2)))
            return found

        module._positions = keep
        undo.append(lambda: delattr(module, '_positions'))
    return undo


def _watch_latents(seen: Record, name: str, module: BidirectionalCrossAttention):
    def note(module: nn.Module, args: tuple) -> None:
        seen.exchanges.append(LatentBlock(name, *args, module))

    return module.register_forward_pre_hook(note).remove
