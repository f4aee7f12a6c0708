"""Models as files that run without this package: ONNX, and packages of AOTInductor.

Both start from one graph made by ``torch.export``. What is exported takes normalized images, as the
model's data preprocessor gives them, and ends in logits or in the backbone's feature maps.
"""

import argparse
import importlib.util
import math
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from ..checkpoint import check_fit, load_whole_model, named
from ..layers import DepthwiseConv2d
from ..models.hierarchical import HierarchicalBackbone
from .check_compile import compiler_problem
from .checks import CommandError, build_model, check_backbone, check_file, check_writable
from .command_line import add_config_options, image_size, read_config
from .files import PARTIAL

OPSET = 18
TOLERANCE = 1e-4
"""Largest difference of a file from PyTorch, in multiples of the largest entry of an output."""
NEAR_TIE = 1e-5
"""Affinities closer than this, in multiples of the largest of the image, may be ranked either way:
they are sums of thousands of products in float32."""
# For PyTorch 2.11, the pinned one. Of maps with sides of their own 2.10 asks in vain whether they
# have 2^31 entries, and AOTInductor of 2.15 makes wrong code; 2.12 to 2.14 were not tried.
OWN_SIDES = (2, 11) <= torch.__version__ < (2, 12)

Runner = Callable[[Tensor], list[Tensor]]


class Exportable(nn.Module):
    """The part of a model that is exported, in eval mode and without gradients.

    Args:
        model: A backbone of ours, or an mmpretrain classifier around one.
        any_size: Whether a backbone's images may have any size. Defaults to True.

    Attributes:
        backbone (HierarchicalBackbone): The backbone.
        classifies (bool): Whether it gives logits; else it gives maps.
        output_names (list[str]): ``['logits']``, or ``'map0'`` and so on by stage.
        any_size (bool): Whether height and width are left open; else only the batch is.
    """

    def __init__(self, model: nn.Module, any_size: bool = True) -> None:
        super().__init__()
        self.classifies = not isinstance(model, HierarchicalBackbone)
        self.any_size = any_size and not self.classifies
        self.model = model
        self.output_names = (
            ['logits'] if self.classifies else [f'map{i}' for i in self.backbone.out_indices]
        )
        self.eval().requires_grad_(False)

    @property
    def backbone(self) -> HierarchicalBackbone:
        return self.model.backbone if self.classifies else self.model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) to logits (B, classes), or to the maps."""
        if self.classifies:
            return (self.model(images, mode='tensor'),)
        return self.model(images)


def build_exportable(
    cfg: Config, backbone_only: bool, checkpoint: str | None, any_size: bool = True
) -> Exportable:
    """Build what is exported of a config's model.

    Args:
        cfg: The whole config; changed in place.
        backbone_only: Whether to export the backbone's maps instead of logits.
        checkpoint: Path or URL of the whole model's weights; None for random ones.
        any_size: Whether a backbone's images may have any size. Defaults to True.

    Raises:
        CommandError: If the model has more than a classifier's parts and not only the backbone is
            wanted, if the backbone is not ours, if its grid depends on sizes that are left open, or
            if the checkpoint lacks weights.
        CheckpointError: If the checkpoint is another model's.
    """
    backbone = cfg.model.get('backbone') or {}
    if not str(backbone.get('type')).startswith('mmbiformer.'):
        raise CommandError(
            f'{cfg.filename}: the backbone is {backbone.get("type")}, not one of ours'
        )
    if cfg.get('default_scope') != 'mmpretrain' and not backbone_only:
        raise CommandError(
            f'{cfg.filename} is a {cfg.model.type}: necks, heads and what follows them are the '
            "host's and are not exported; --backbone exports the feature maps"
        )
    if backbone_only and any_size and backbone.get('region_grid') == 'auto':
        raise CommandError(
            f"{cfg.filename}: region_grid='auto' chooses another grid for each size and cannot be "
            'exported for all of them; give the size as --shape, or region_grid as a number'
        )
    backbone.backend = 'sdpa'  # the fused kernels are operators that no other runtime has
    check_backbone(cfg)
    model = MODELS.build({**backbone, 'init_cfg': None}) if backbone_only else build_model(cfg)
    if checkpoint is not None:
        _load(nn.ModuleDict(dict(backbone=model)) if backbone_only else model, checkpoint)
    return Exportable(model, any_size)


def _load(model: nn.Module, path: str) -> None:
    """Load all weights of a whole model; MMEngine would only log what is missing."""
    check_file(path, 'CHECKPOINT')
    checkpoint = load_whole_model(path)
    given = checkpoint.get('state_dict', checkpoint)
    state = OrderedDict((name.removeprefix('module.'), given[name]) for name in given)
    state._metadata = getattr(given, '_metadata', OrderedDict())  # tells STL from STL-nchw
    try:
        with named(path):
            model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of shapes
        lines = str(error).splitlines()
        raise CommandError(f'{path} does not fit the config: {lines[-1].strip()}') from error
    check_fit(model, state, path)


def trace(net: Exportable, size: tuple[int, int]) -> ExportedProgram:
    """Make the graph.

    Args:
        net: What is exported.
        size: Height and width of all images, in pixels. Not used if ``net.any_size``.

    Returns:
        ExportedProgram: For any batch, and if ``net.any_size`` for any height and width.
    """
    axes, hooks, own_sides = [0], [], _OwnSides()
    if net.any_size:
        axes += [2, 3]
        # Nothing runs at this size, but the graph keeps what is true of it: regions of several
        # tokens in every stage, and no multiples of anything.
        routed = [m for m in net.modules() if hasattr(m, 'region_grid')]
        rows, cols = map(max, zip(*(m.region_grid for m in routed), strict=True))
        size = 64 * rows + 37, 64 * cols + 53
        if OWN_SIDES and all(m.padding == 'input' for m in routed):
            convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
            hooks = [conv.register_forward_hook(own_sides) for conv in convs]
    shapes = {'images': dict.fromkeys(axes, Dim.DYNAMIC)}
    try:
        with torch.no_grad():
            program = torch.export.export(net, (torch.empty(2, 3, *size),), dynamic_shapes=shapes)
    finally:
        for hook in hooks:
            hook.remove()
    own_sides.tell()
    return program


class _OwnSides:
    """Hook of layers that make maps smaller: in the graph, these maps have sides of their own.

    As terms of the images' height and width, rounded up by 4 and so on, they would make sums of
    products of quotients of every index in a block; AOTInductor then took eight minutes for four
    blocks, and with sides of their own one and a half.

    Not for the padding policies under which the number of regions depends on the map: tracing asks
    then what cannot be said of sides that nothing is known of.
    """

    def __init__(self) -> None:
        self.sides: dict[object, torch.SymInt] = {}  # by what they are in terms of others

    def __call__(self, layer: nn.Conv2d, args: tuple[Tensor], x: Tensor) -> Tensor:
        for axis in (1, 2) if isinstance(layer, DepthwiseConv2d) else (2, 3):
            length = x.shape[axis].node.expr
            if length not in self.sides:
                side = torch.scalar_tensor(x.shape[axis], dtype=torch.int64).item()
                torch._check(side >= 2)  # convolutions ask
                self.sides[length] = side
            x = x.index_select(axis, torch.arange(self.sides[length]))
        return x

    def tell(self) -> None:
        """Tell the finished graph how long the sides were: AOTInductor decides by examples."""
        for length, side in self.sides.items():
            env = side.node.shape_env
            env.add_backed_var_to_val(side.node.expr, env.size_hint(length))


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Attention in nodes that ONNX Runtime fuses; in torch's own it turns over all keys first."""
    from onnxscript import opset18 as op

    scale = op.Constant(value_float=query.shape[3] ** -0.5 if scale is None else scale)
    logits = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        logits = op.Add(logits, attn_mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


def _gelu(x, approximate='none'):
    """GELU in nodes that ONNX Runtime fuses; torch's own have another order, which it does not."""
    from onnxscript import opset18 as op

    erf = op.Erf(op.Div(x, op.Constant(value_float=math.sqrt(2))))
    product = op.Mul(x, op.Add(erf, op.Constant(value_float=1.0)))
    return op.Mul(product, op.Constant(value_float=0.5))


def write_onnx(program: ExportedProgram, path: Path, net: Exportable) -> None:
    """Write an ONNX file; its input is ``images``, its outputs are ``net.output_names``."""
    onnx_program = torch.onnx.export(
        program,
        input_names=['images'],
        output_names=net.output_names,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
        custom_translation_table={
            torch.ops.aten.scaled_dot_product_attention.default: _attention,
            torch.ops.aten.gelu.default: _gelu,
        },
    )
    proto = onnx_program.model_proto
    # torch calls the open sizes s77, u0 or so; of map1 they are batch, height1 and width1.
    names: dict[str, str] = {}
    for value in (*proto.graph.input, *proto.graph.output):
        stage = value.name.removeprefix('map') if value.name.startswith('map') else ''
        axes = 'batch', 'channels', f'height{stage}', f'width{stage}'
        for dim, name in zip(value.type.tensor_type.shape.dim, axes, strict=False):  # of logits 2
            if dim.dim_param:
                names.setdefault(dim.dim_param, name)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                terms = names.get(dim.dim_param, dim.dim_param)
                dim.dim_param = re.sub(r'\w+', lambda m: names.get(m[0], m[0]), terms)
    path.write_bytes(proto.SerializeToString())


def run_onnx(path: Path, threads: int = 0) -> Runner:
    """Load an ONNX file into ONNX Runtime, on CPU; 0 threads are as many as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=['CPUExecutionProvider']
    )
    return lambda images: [
        torch.from_numpy(x) for x in session.run(None, {'images': images.numpy()})
    ]


def write_package(program: ExportedProgram, path: Path, net: Exportable) -> None:
    """Compile a graph with AOTInductor for CPU and write the package.

    Raises:
        CommandError: If there is no compiler.
    """
    if problem := compiler_problem():
        raise CommandError(problem)
    # Of the example it would keep that regions have several tokens, and refuse smaller maps. What
    # it makes is right for them too: the tests go down to images of one pixel.
    options = dict(scalar_asserts=False)
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=options
    )


def run_package(path: Path) -> Runner:
    """Load a package of AOTInductor."""
    package = torch._inductor.aoti_load_package(str(path))
    return lambda images: list(package(images))


class NearestTie(TorchFunctionMode):
    """Watches the routing: how close any choice of regions came to another.

    Attributes:
        gap (float): The smallest gap between the last chosen affinity and the first left out, in
            multiples of the largest affinity of the layer.
    """

    gap = math.inf

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.topk and args[1] < args[0].shape[-1]:
            affinity, k = args[:2]
            last, first = affinity.topk(k + 1).values[..., -2:].unbind(-1)
            self.gap = min(self.gap, ((last - first).min() / affinity.abs().max()).item())
        return func(*args, **(kwargs or {}))


def _difference(found: Tensor, expected: Tensor) -> float:
    """See :func:`compare`."""
    if found.shape != expected.shape:
        return math.inf
    # NaN is larger than nothing: max() would pass over it.
    if not (found.isfinite().all() and expected.isfinite().all()):
        return math.inf
    if torch.equal(found, expected):
        return 0.0  # also where all entries are zero
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(net: Exportable, run: Runner, images: Tensor) -> tuple[float, float]:
    """Run a file and PyTorch on the same images.

    Args:
        net: What was exported.
        run: Runs the file.
        images: (B, 3, H, W), float32.

    Returns:
        tuple[float, float]: The largest difference of any output, in multiples of the largest entry
        of that output, infinite if shapes differ or anything is not finite; and the gap of
        :class:`NearestTie`.
    """
    with torch.no_grad(), NearestTie() as tie:
        expected = net(images)
    pairs = zip(run(images), expected, strict=True)
    return max(_difference(*pair) for pair in pairs), tie.gap


def check(net: Exportable, run: Runner, size: tuple[int, int], images: int = 5) -> str:
    """Check that a file gives what PyTorch gives, at another size than it was traced at.

    A region's routes are the k most akin to it. Where two are akin to the last bits, either may be
    chosen, and the maps then differ there. An image counts as such a tie only if its gap says so,
    and one image at least must agree everywhere.

    Args:
        net: What was exported.
        run: Runs the file.
        size: Height and width of the images to check with.
        images: How many to try. Defaults to 5.

    Returns:
        str: What was found, for the user.

    Raises:
        CommandError: If the file gives something else.
    """
    generator = torch.Generator().manual_seed(0)
    for ties in range(images):
        batch = torch.randn(1, 3, *size, generator=generator)
        difference, gap = compare(net, run, batch)
        if difference <= TOLERANCE:
            after = f', after {ties} with near-ties in the routing' if ties else ''
            return f'equal to PyTorch to {difference:.1e} at 1x3x{size[0]}x{size[1]}{after}'
        if gap > NEAR_TIE:
            break
    raise CommandError(
        f'the file differs from PyTorch by {difference:.1e} of the largest output on an image of '
        f'{size[0]}x{size[1]} (nearest tie in the routing: {gap:.1e}); nothing was written. '
        'Please report it with the versions of torch and of the runtime.'
    )


def run_export(
    description: str,
    suffix: str,
    needs: tuple[str, ...],
    note: str,
    write: Callable[[ExportedProgram, Path, Exportable], None],
    load: Callable[[Path], Runner],
) -> None:
    """The command: read, build, trace, write, check, name.

    Args:
        description: What the command does.
        suffix: How its files' names end.
        needs: Packages that it needs.
        note: What to tell the user of the format.
        write: Writes a graph to a file.
        load: Loads such a file.
    """
    args = _parse_args(description, suffix)
    if not hasattr(Dim, 'DYNAMIC'):
        raise CommandError(
            f'torch {torch.__version__} cannot export for sizes that may be any; install a later '
            'one, such as that of `make env`'
        )
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f'{" and ".join(missing)} not installed; install this package with its extra '
            "'export': pip install -e '.[export]'"
        )
    if args.out.suffix != suffix:
        raise CommandError(f'--out {args.out}: the name must end in {suffix}')
    if args.out.exists():
        raise CommandError(f'{args.out} exists already; remove it or choose another name')
    check_writable(str(args.out.parent), '--out')
    cfg = read_config(args)
    net = build_exportable(cfg, args.backbone, args.checkpoint, any_size=args.shape is None)
    size = _image_size(cfg, args.shape, net)
    if args.checkpoint is None:
        print('no CHECKPOINT is given: the weights are random')

    print('1/3 tracing the graph', flush=True)
    program = trace(net, size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own first: what is interrupted or wrong leaves no file. Its name is no
    # user's, and the same each time: what a killed process left is replaced.
    folder = args.out.with_name(f'.{args.out.name}{PARTIAL}')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        partial = folder / args.out.name
        print(f'2/3 writing the {suffix} file, which takes minutes', flush=True)
        write(program, partial, net)
        print('3/3 running it beside PyTorch', flush=True)
        result = check(net, load(partial), size)
        os.replace(partial, args.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    sides = 'height, width' if net.any_size else f'{size[0]}, {size[1]}'
    print(f'wrote {args.out}: {args.out.stat().st_size / 2**20:.1f} MiB, {note}')
    print(f'  input: images (batch, 3, {sides}), float32, normalized: {_normalization(cfg)}')
    print(f'  outputs: {", ".join(net.output_names)}')
    print(f'  {result}')


def _parse_args(description: str, suffix: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    add_config_options(parser)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        metavar='CHECKPOINT',
        help='checkpoint of the whole model (default: random weights)',
    )
    parser.add_argument(
        '--out', type=Path, required=True, metavar=f'FILE{suffix}', help='file to write'
    )
    parser.add_argument(
        '--backbone',
        action='store_true',
        help="export the backbone's feature maps, for images of any size or of --shape",
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='height and width of the images, or one number for both (default: 224, with '
        '--backbone any)',
    )
    return parser.parse_args()


def _image_size(cfg: Config, shape: list[int] | None, net: Exportable) -> tuple[int, int]:
    """Height and width as asked for; raises CommandError if they are too small."""
    least = net.backbone.min_size
    if shape is None and net.any_size:
        return max(203, least[0]), max(321, least[1])
    size = image_size(cfg, shape)
    if size[0] < least[0] or size[1] < least[1]:
        raise CommandError(
            f'--shape {size[0]} {size[1]}: this model needs images of at least '
            f'{least[0]}x{least[1]} pixels'
        )
    return size


def _normalization(cfg: Config) -> str:
    """What the data preprocessor does to pixels."""
    settings = {
        **(cfg.get('data_preprocessor') or {}),
        **(cfg.model.get('data_preprocessor') or {}),
    }
    order = 'RGB' if settings.get('to_rgb') or settings.get('bgr_to_rgb') else 'BGR'
    return f'{order}, mean {settings.get("mean")}, std {settings.get("std")}'
