"""The settings of one call, which every backend takes beside the tensors."""

from typing import NamedTuple


class Settings(NamedTuple):
    """The numbers of one call of :func:`mmbiformer.ops.routed_attention`.

    Attributes:
        num_heads (int): Number of heads.
        region_size (tuple[int, int]): Height and width of a query region, in tokens.
        key_region_size (tuple[int, int]): Height and width of a key region, in tokens.
        scale (float): Factor on the logits.
    """

    num_heads: int
    region_size: tuple[int, int]
    key_region_size: tuple[int, int]
    scale: float
