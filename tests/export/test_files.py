"""Exported files give what PyTorch gives, at sizes that they were not traced at.

A difference is measured in multiples of the largest entry of the output. Regions whose affinities
are equal but for rounding may be chosen either way, so ONNX files are also asked for their routes:
these may differ from PyTorch's by near-ties only, and along the same routes everything is equal.
"""

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmbiformer.errors import UserError
from mmbiformer.export.aoti import run_package, write_package
from mmbiformer.export.graph import Exportable, trace
from mmbiformer.export.onnx import run_onnx, write_onnx
from mmbiformer.export.verify import NEAR_TIE, TOLERANCE, check, compare
from mmbiformer.models import BiFormer, BiXT, DeBiFormer

ARCHS = {
    BiFormer: dict(depths=(1, 1), embed_dims=(32, 64), mlp_ratio=1, topks=(2, None)),
    DeBiFormer: dict(
        depths=(1, 1),
        embed_dims=(32, 64),
        mlp_ratios=(1, 1),
        agent_mlp_ratios=(1, 1),
        topks=(2, None),
        agent_topks=(2, 9),
        groups=(1, 2),
        strides=(4, 2),
        offset_kernels=(5, 3),
        table_sizes=(8, 4),
    ),
}
FIRST_STAGE = {
    key: values[:1] if isinstance(values, tuple) else values
    for key, values in ARCHS[DeBiFormer].items()
}
"""Tracing both stages takes a minute."""
SIZES = [
    *((1, 97, 131), (3, 75, 211), (2, 101, 101), (1, 64, 33), (1, 33, 64)),
    *((2, 129, 65), (1, 203, 57), (1, 57, 203), (4, 41, 43), (1, 160, 96)),
    # Regions of one token or none.
    *((1, 1, 1), (2, 5, 9), (1, 4, 131), (1, 131, 4), (17, 12, 12), (3, 24, 25)),
]
"""Batch, height and width."""


def small(family, **kwargs):
    torch.manual_seed(0)
    defaults = {} if family is BiXT else dict(arch=ARCHS[family], region_grid=3)
    return family(**defaults | kwargs)


class Follow(TorchFunctionMode):
    """Takes given routes instead of those that PyTorch would choose.

    Each of them must be among the k most similar regions, or as good as.
    """

    def __init__(self, routes):
        super().__init__()
        self.routes = iter(routes)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not Tensor.topk:
            return out
        affinity, routes = args[0], next(self.routes)
        assert routes.shape == out.indices.shape
        assert (routes.sort(-1).values.diff(dim=-1) > 0).all()  # each region once
        lacks = out.values[..., -1:] - affinity.gather(-1, routes)
        assert lacks.max() <= NEAR_TIE * affinity.abs().max()
        return torch.return_types.topk((affinity.gather(-1, routes), routes))


class OnnxFile:
    """An ONNX file in ONNX Runtime, and the routes that it takes."""

    def __init__(self, path):
        model = onnx.load(path)
        onnx.checker.check_model(model)
        self.inputs, self.outputs = (
            {
                x.name: [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim]
                for x in values
            }
            for values in (model.graph.input, model.graph.output)
        )
        for node in model.graph.node:
            if node.op_type == 'TopK':
                kind = onnx.TensorProto.INT64
                routes = onnx.helper.make_tensor_value_info(node.output[1], kind, None)
                model.graph.output.append(routes)
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=['CPUExecutionProvider']
        )

    def __call__(self, images):
        """Outputs and routes."""
        outs = [torch.from_numpy(x) for x in self.session.run(None, {'images': images.numpy()})]
        return outs[: len(self.outputs)], outs[len(self.outputs) :]


def assert_equals_pytorch(net, file, images):
    found, routes = file(images)
    with torch.no_grad(), Follow(routes) as follow:
        expected = net(images)
    assert next(follow.routes, None) is None
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= TOLERANCE * b.abs().max()


@pytest.fixture(scope='module')
def onnx_file(tmp_path_factory):
    """Makes the ONNX file of a small backbone once."""
    made = {}

    def make(family, **kwargs):
        key = family, str(kwargs)
        if key not in made:
            net = Exportable(small(family, **kwargs))
            path = tmp_path_factory.mktemp('onnx') / 'maps.onnx'
            write_onnx(trace(net), path, net)
            made[key] = net, path
        return made[key]

    return make


SLOW = pytest.mark.slow  # tracing takes a minute or more


@pytest.mark.parametrize(
    ('family', 'kwargs'),
    [
        (BiFormer, {}),
        (DeBiFormer, dict(arch=FIRST_STAGE)),
        pytest.param(BiFormer, dict(arch='tiny', region_grid=7), marks=SLOW),
        pytest.param(BiFormer, dict(in_channels=4), marks=SLOW),
        pytest.param(BiFormer, dict(padding='mask'), marks=SLOW),
        pytest.param(BiFormer, dict(padding='projected'), marks=SLOW),
        pytest.param(DeBiFormer, {}, marks=SLOW),
        pytest.param(DeBiFormer, dict(padding='mask'), marks=SLOW),
    ],
)
def test_onnx_equals_pytorch_at_any_size(family, kwargs, onnx_file):
    net, path = onnx_file(family, **kwargs)
    file, channels = OnnxFile(path), net.backbone.in_channels
    assert file.inputs == {'images': ['batch', channels, 'height', 'width']}
    width = 64 if kwargs.get('arch') == 'tiny' else 32
    assert file.outputs == {
        f'map{i}': ['batch', width << i, f'height{i}', f'width{i}']
        for i in range(len(net.backbone.stages))
    }
    for batch, *size in SIZES:
        if min(size) >= min(net.backbone.min_size):
            assert_equals_pytorch(net, file, torch.randn(batch, channels, *size))


BIXT = dict(arch=dict(dim=32, depth=3, num_latents=5, stride=8))


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(out_type='featmap', out_indices=(0, 1)),
        pytest.param(dict(out_type='latents'), marks=SLOW),
        pytest.param(
            dict(arch=dict(BIXT['arch'], tokenizer='conv', layer_scale=0.1), out_type='featmap'),
            marks=SLOW,
        ),
    ],
)
def test_bixt_equals_pytorch_at_any_size(kwargs, tmp_path):
    net = Exportable(small(BiXT, **(BIXT | kwargs)))
    write_onnx(trace(net), tmp_path / 'bixt.onnx', net)
    file = OnnxFile(tmp_path / 'bixt.onnx')
    assert file.inputs == {'images': ['batch', 3, 'height', 'width']}
    for batch, *size in SIZES:
        assert_equals_pytorch(net, file, torch.randn(batch, 3, *size))


def test_another_file_is_told_apart(onnx_file):
    """The measure itself: other weights differ, and other routes are no near-ties."""
    net, path = onnx_file(BiFormer)
    images = torch.randn(1, 3, 97, 131)
    assert compare(net, run_onnx(path), images)[0] <= TOLERANCE
    other = Exportable(small(BiFormer))
    with torch.no_grad():
        other.backbone.norm1.weight[3] *= 1.001
    assert compare(other, run_onnx(path), images)[0] > TOLERANCE
    outs, (routes,) = OnnxFile(path)(images)
    with pytest.raises(AssertionError):
        assert_equals_pytorch(net, lambda _: (outs, [(routes + 1) % 9]), images)


@pytest.mark.slow  # the C++ compiler takes a minute or more
@pytest.mark.parametrize(
    ('family', 'kwargs'),
    [(BiFormer, {}), (DeBiFormer, {}), (BiXT, BIXT), (BiXT, dict(BIXT, out_type='featmap'))],
)
def test_package_equals_pytorch_at_any_size(family, kwargs, tmp_path):
    net = Exportable(small(family, **kwargs))
    path = tmp_path / 'maps.pt2'
    write_package(trace(net), path, net)
    run = run_package(path)
    for batch, *size in SIZES:
        difference, gap = compare(net, run, torch.randn(batch, 3, *size))
        assert difference <= TOLERANCE or gap <= NEAR_TIE
        check(net, run, size)


def test_auto_grid_needs_one_size():
    with pytest.raises(UserError, match=r"region_grid='auto' .* give the size as --shape"):
        Exportable(small(BiFormer, region_grid='auto'))
    assert not Exportable(small(BiFormer, region_grid='auto'), any_size=False).any_size
