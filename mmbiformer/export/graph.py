"""The graph of a model, made by ``torch.export``: all files that are written start from it.

The graph takes normalized images, as the model's data preprocessor gives them, and ends in logits
or in the backbone's feature maps.
"""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import UserError
from ..layers import DepthwiseConv2d
from ..models.base import Backbone

# Sides of their own suit PyTorch 2.11 only: 2.10 fails on them (it asks whether such maps have 2^31
# entries), and AOTInductor of 2.15 makes wrong code of them. 2.12 to 2.14 were not tried.
OWN_SIDES = (2, 11) <= torch.__version__ < (2, 12)


class Exportable(nn.Module):
    """The part of a model that is exported, in eval mode and without gradients.

    Attention runs in PyTorch's own operators then: other runtimes do not have the fused kernels.

    Args:
        model: A backbone of this package, or an mmpretrain classifier around one; changed in place.
        any_size: Whether a backbone's images may have any size. Defaults to True.

    Attributes:
        backbone (Backbone): The backbone.
        classifies (bool): Whether the outputs are logits; else they are maps.
        output_names (list[str]): ``['logits']``, or ``'map0'`` and so on by stage or block, or
            ``['features']``.
        metadata (dict[str, str]): What a file says about itself beside the graph.
        any_size (bool): Whether height and width are left open. The batch always is.

    Raises:
        UserError: If any size is asked for, but the region grid depends on the size.
    """

    def __init__(self, model: nn.Module, any_size: bool = True) -> None:
        super().__init__()
        self.classifies = not isinstance(model, Backbone)
        self.metadata: dict[str, str] = {}
        self.any_size = any_size and not self.classifies
        self.model = model
        if self.classifies:
            self.output_names = ['logits']
        else:  # a backbone without maps gives one feature
            self.output_names = [f'map{i}' for i in self.backbone.out_indices] or ['features']
        for layer in self.routed_layers():
            layer.backend = 'sdpa'
            if self.any_size and layer.region_grid == 'auto':
                raise UserError(
                    "region_grid='auto' chooses another grid for each size and cannot be exported "
                    'for all of them; give the size as --shape, or region_grid as a number'
                )
        self.eval().requires_grad_(False)

    @property
    def backbone(self) -> Backbone:
        return self.model.backbone if self.classifies else self.model

    def routed_layers(self) -> list[nn.Module]:
        """The attention layers that cut their map into regions."""
        return [module for module in self.modules() if hasattr(module, 'region_grid')]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, C, H, W) to logits (B, classes), or to the maps."""
        if self.classifies:
            return (self.model(images, mode='tensor'),)
        return self.model(images)

    def axes(self, name: str) -> tuple[str, ...]:
        """Names of the axes of an input or output; logits have two of them."""
        stage = name.removeprefix('map') if name.startswith('map') else ''
        return 'batch', 'channels', f'height{stage}', f'width{stage}'

    def sample(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """A random image of a size, to check a file with."""
        return torch.randn(1, self.backbone.in_channels, *size, generator=generator)


def trace(net: Exportable, size: tuple[int, int] | None = None) -> ExportedProgram:
    """Make the graph.

    Args:
        net: What is exported.
        size: Height and width of all images, in pixels. Not used if ``net.any_size``. Defaults to
            None.

    Returns:
        ExportedProgram: For any batch, and if ``net.any_size`` for any height and width.
    """
    axes, hooks, own_sides = [0], [], _OwnSides()
    if net.any_size:
        axes += [2, 3]
        # Nothing runs at this size, but the graph keeps what is true of it. So it has regions of
        # several tokens in every stage, and no side is a multiple of anything.
        routed = net.routed_layers()
        grids = [layer.region_grid for layer in routed] or [(3, 3)]
        rows, cols = map(max, zip(*grids, strict=True))
        size = 64 * rows + 37, 64 * cols + 53
        if OWN_SIDES and all(layer.padding == 'input' for layer in routed):
            convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
            hooks = [conv.register_forward_hook(own_sides) for conv in convs]
    images = torch.empty(2, net.backbone.in_channels, *size)
    shapes = {'images': dict.fromkeys(axes, Dim.DYNAMIC)}
    try:
        with torch.no_grad():
            program = torch.export.export(net, (images,), dynamic_shapes=shapes)
    finally:
        for hook in hooks:
            hook.remove()
    own_sides.give_examples()
    return program


class _OwnSides:
    """Hook of layers that make maps smaller: in the graph, these maps get sides of their own.

    Otherwise a side is a term of the images' height or width, divided by 4, rounded up and so on,
    and every index in a block is a sum of products of such terms. AOTInductor took eight minutes
    for four blocks then, and takes one and a half with sides of their own.

    Under the other padding policies the number of regions depends on the map, and tracing asks
    questions that a side of its own cannot answer.
    """

    def __init__(self) -> None:
        self.sides: dict[object, torch.SymInt] = {}  # by their terms of height and width

    def __call__(self, layer: nn.Conv2d, args: tuple[Tensor], x: Tensor) -> Tensor:
        for axis in (1, 2) if isinstance(layer, DepthwiseConv2d) else (2, 3):
            length = x.shape[axis].node.expr
            if length not in self.sides:
                side = torch.scalar_tensor(x.shape[axis], dtype=torch.int64).item()
                torch._check(side >= 2)  # convolutions ask
                self.sides[length] = side
            x = x.index_select(axis, torch.arange(self.sides[length]))
        return x

    def give_examples(self) -> None:
        """Note in the finished graph how long the sides were: AOTInductor decides by examples."""
        for length, side in self.sides.items():
            env = side.node.shape_env
            env.add_backed_var_to_val(side.node.expr, env.size_hint(length))
