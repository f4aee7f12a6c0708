"""Toy backbones of every family."""

from mmbiformer.models import BiFormer, BiXT, DeBiFormer

ARCHS = {
    BiFormer: dict(
        depths=(1, 1, 2, 1), embed_dims=(32, 64, 96, 128), mlp_ratio=2, topks=(1, 2, 4, None)
    ),
    DeBiFormer: dict(
        depths=(1, 1, 2, 1),
        embed_dims=(32, 64, 96, 128),
        mlp_ratios=(2, 2, 2, 1),
        agent_mlp_ratios=(1, 1, 1, 2),
        topks=(1, 2, 4, None),
        agent_topks=(1, 2, 4, 3),
        groups=(1, 2, 3, 2),
        table_sizes=(8, 4, 3, 2),
    ),
    BiXT: dict(dim=64, depth=4, num_latents=5, stride=8),
}


def toy(family=BiFormer, **kwargs):
    """A small backbone; stages are 32, 64, 96 and 128 channels wide, a BiXT is 64."""
    options = {} if family is BiXT else dict(region_grid=2)
    return family(**{'arch': ARCHS[family], **options, **kwargs})
