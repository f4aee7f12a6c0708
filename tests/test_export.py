"""Exported files give what PyTorch gives, at sizes that they were not traced at.

A difference is measured in multiples of the largest entry of the output. Regions whose affinities
are equal to the last bits may be chosen either way, so ONNX files are also asked for their routes:
these may differ from PyTorch's by near-ties only, and along the same routes everything is equal.
"""

import importlib.util
import math
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmbiformer.engine import export
from mmbiformer.engine.checks import CommandError, build_model
from mmbiformer.engine.export import (
    NEAR_TIE,
    TOLERANCE,
    Exportable,
    NearestTie,
    build_exportable,
    check,
    compare,
    run_onnx,
    run_package,
    trace,
    write_onnx,
    write_package,
)
from mmbiformer.models import BiFormer, DeBiFormer
from mmbiformer.safe_load import CheckpointError

ROOT = Path(__file__).parent.parent
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
"""Half of it: its graph takes a minute to make."""
BATCHES = [
    *((1, 97, 131), (3, 75, 211), (2, 101, 101), (1, 64, 33), (1, 33, 64)),
    *((2, 129, 65), (1, 203, 57), (1, 57, 203), (4, 41, 43), (1, 160, 96)),
]
"""Batch, height and width."""
TINY = [(1, 1, 1), (2, 5, 9), (1, 4, 131), (1, 131, 4), (17, 12, 12), (3, 24, 25)]
"""The same, of regions of one token or none."""


def small(family, **kwargs):
    torch.manual_seed(0)
    return family(**dict(arch=ARCHS[family], region_grid=3, backend='sdpa') | kwargs)


class Follow(TorchFunctionMode):
    """Takes given routes instead of those that PyTorch would choose.

    Each of them must be among the k most akin regions, or as good as.
    """

    def __init__(self, routes):
        super().__init__()
        self.routes = iter(routes)
        self.near_ties = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not Tensor.topk:
            return out
        affinity, routes = args[0], next(self.routes)
        assert routes.shape == out.indices.shape
        assert (routes.sort(-1).values.diff(dim=-1) > 0).all()  # each region once
        lacks = out.values[..., -1:] - affinity.gather(-1, routes)
        assert lacks.max() <= NEAR_TIE * affinity.abs().max()
        other = routes.sort(-1).values != out.indices.sort(-1).values
        self.near_ties += other.any(-1).sum().item()
        return torch.return_types.topk((affinity.gather(-1, routes), routes))


class OnnxFile:
    """An ONNX file in ONNX Runtime, and the routes that it takes."""

    def __init__(self, path):
        model = onnx.load(path)
        onnx.checker.check_model(model)
        self.names = [output.name for output in model.graph.output]
        self.inputs, self.outputs = (
            [
                (x.name, [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim])
                for x in values
            ]
            for values in (model.graph.input, model.graph.output)
        )
        routes = [node.output[1] for node in model.graph.node if node.op_type == 'TopK']
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None)
            for name in routes
        )
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=['CPUExecutionProvider']
        )

    def __call__(self, images):
        """Outputs and routes."""
        outs = [torch.from_numpy(x) for x in self.session.run(None, {'images': images.numpy()})]
        return outs[: len(self.names)], outs[len(self.names) :]


def assert_equals_pytorch(net, file, images):
    """Equal along the file's routes; returns in how many rows these are not PyTorch's."""
    found, routes = file(images)
    with torch.no_grad(), Follow(routes) as follow:
        expected = net(images)
    assert next(follow.routes, None) is None
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= TOLERANCE * b.abs().max()
    return follow.near_ties


@pytest.fixture(scope='module')
def onnx_file(tmp_path_factory):
    """Makes the ONNX file of a small backbone once."""
    made = {}

    def make(family, **kwargs):
        key = family, str(kwargs)
        if key not in made:
            net = Exportable(small(family, **kwargs))
            path = tmp_path_factory.mktemp('onnx') / 'maps.onnx'
            write_onnx(trace(net, None), path, net)
            made[key] = net, path
        return made[key]

    return make


@pytest.mark.parametrize(
    ('family', 'kwargs'),
    [
        (BiFormer, {}),
        (DeBiFormer, dict(arch=FIRST_STAGE)),
        pytest.param(DeBiFormer, {}, marks=pytest.mark.slow),
        pytest.param(BiFormer, dict(padding='mask'), marks=pytest.mark.slow),
        pytest.param(BiFormer, dict(padding='projected'), marks=pytest.mark.slow),
        pytest.param(DeBiFormer, dict(padding='mask'), marks=pytest.mark.slow),
    ],
)
def test_onnx_equals_pytorch_at_any_size(family, kwargs, onnx_file):
    net, path = onnx_file(family, **kwargs)
    file = OnnxFile(path)
    assert file.inputs == [('images', ['batch', 3, 'height', 'width'])]
    assert file.outputs == [
        (f'map{i}', ['batch', 32 << i, f'height{i}', f'width{i}'])
        for i in range(len(net.backbone.stages))
    ]
    for batch, *size in BATCHES + TINY:
        if min(size) >= min(net.backbone.min_size):
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


@pytest.mark.parametrize(
    ('found', 'expected', 'difference'),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.2),
        ([0.0, math.nan], [0.0, 1.0], math.inf),
        ([0.0, math.nan], [0.0, math.nan], math.inf),
        ([0.0, 1.0], [0.0, math.nan], math.inf),
        ([math.inf], [math.inf], math.inf),
        ([math.inf], [1.0], math.inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1e-9], [0.0, 0.0], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
    ],
)
def test_differences_of_any_output_count(found, expected, difference):
    """Of the second output too, where max() passes over NaN."""
    found, expected = torch.tensor(found), torch.tensor(expected)
    same = torch.ones(2)
    images = torch.ones(1)
    for first in (False, True):
        outs = [[x, same] if first else [same, x] for x in (expected, found)]
        net, run = (lambda _, out=out: out for out in outs)
        assert compare(net, run, images)[0] == pytest.approx(difference)
        if difference:
            with pytest.raises(CommandError, match='nothing was written'):
                check(net, run, (2, 2))


def test_gap_of_the_routing():
    affinity = torch.tensor([[8.0, 4.0, 2.0, 2.0], [3.0, 2.5, 0.0, -9.0]])
    for k, gap in ((1, 0.5 / 9), (2, 2 / 9), (3, 0.0), (4, math.inf)):
        with NearestTie() as tie:
            affinity.topk(k, dim=-1)
        assert tie.gap == pytest.approx(gap)


def test_check_takes_near_ties_for_what_they_are(onnx_file, monkeypatch):
    net = onnx_file(BiFormer)[0]
    calls = []

    def wrong_at_first(images):
        calls.append(images)
        return [x + (len(calls) == 1) for x in net(images)]

    with pytest.raises(CommandError, match=r'differs from PyTorch by .* nothing was written'):
        check(net, wrong_at_first, (65, 97))
    assert len(calls) == 1  # no tie: no other image is tried
    monkeypatch.setattr(export, 'NEAR_TIE', 2.0)
    calls.clear()
    assert 'after 1 with near-ties' in check(net, wrong_at_first, (65, 97))
    with pytest.raises(CommandError, match='differs'):
        check(net, lambda images: [x + 1 for x in net(images)], (65, 97))


@pytest.mark.parametrize('family', [BiFormer, pytest.param(DeBiFormer, marks=pytest.mark.slow)])
def test_package_equals_pytorch_at_any_size(family, tmp_path):
    net = Exportable(small(family))
    path = tmp_path / 'maps.pt2'
    write_package(trace(net, None), path, net)
    run = run_package(path)
    for batch, *size in BATCHES + TINY:
        difference, gap = compare(net, run, torch.randn(batch, 3, *size))
        assert difference <= TOLERANCE or gap <= NEAR_TIE
        check(net, run, size)


@pytest.mark.slow
def test_biformer_t_at_ten_odd_sizes(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/sfpn_biformer_t_ade20k.py')
    net = build_exportable(cfg, backbone_only=True, checkpoint=None)
    path = tmp_path / 'maps.onnx'
    write_onnx(trace(net, None), path, net)
    file = OnnxFile(path)
    near_ties = 0
    sizes = [
        *((225, 321), (129, 515), (387, 203), (97, 97), (511, 129)),
        *((333, 271), (65, 449), (257, 257), (191, 383), (301, 99)),
    ]
    for size in sizes:
        near_ties += assert_equals_pytorch(net, file, torch.randn(1, 3, *size))
    print(f'rows of routes that differ, all of them near-ties: {near_ties}')


# The commands


@pytest.fixture
def tool(monkeypatch):
    """Runs a command in this process, as its file would."""

    def run(name, *args):
        path = ROOT / 'tools/deployment' / name
        spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr('sys.argv', [str(path), *map(str, args)])
        module.main()

    return run


def toy_config(folder, base):
    """A shipped config with a small backbone."""
    family = DeBiFormer if 'debiformer' in base else BiFormer
    config = folder / f'{Path(base).stem}.py'
    head = 'head=dict(in_channels=64, num_classes=7)' if base.endswith('in1k.py') else ''
    config.write_text(
        f"_base_ = '{ROOT}/{base}'\nmodel = dict(backbone=dict("
        f'arch=dict(_delete_=True, **{ARCHS[family]}), region_grid=3), {head})\n'
    )
    return config


def save_checkpoint(config, path):
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = build_model(cfg)
    torch.save(dict(meta={}, state_dict=model.state_dict()), path)
    return model.eval()


@pytest.mark.parametrize('family', ['biformer', pytest.param('debiformer', marks=pytest.mark.slow)])
def test_logits_of_a_checkpoint(family, tool, tmp_path, capsys):
    config = toy_config(tmp_path, f'configs/{family}_t_in1k.py')
    model = save_checkpoint(config, tmp_path / 'model.pth')
    out = tmp_path / 'logits.onnx'
    tool('export_onnx.py', config, tmp_path / 'model.pth', '--out', out, '--shape', '75', '91')
    printed = capsys.readouterr().out
    assert f'wrote {out}: ' in printed
    assert 'opset 18' in printed
    assert 'input: images (batch, 3, 75, 91), float32, normalized: RGB, mean [123.675' in printed
    assert 'outputs: logits' in printed
    assert 'equal to PyTorch to ' in printed
    assert 'random' not in printed
    file = OnnxFile(out)
    assert file.inputs == [('images', ['batch', 3, 75, 91])]
    images = torch.randn(3, 3, 75, 91)
    assert file(images)[0][0].shape == (3, 7)
    assert_equals_pytorch(lambda x: (model(x, mode='tensor'),), file, images)


CLASSIFIER = 'configs/biformer_t_in1k.py'
REFUSED = {
    'a detector': (
        'configs/retinanet_biformer_t_coco.py', ['--out', 'a.onnx'],
        'is a RetinaNet: .* not exported; --backbone exports the feature maps',
    ),
    'a grid for each size': (
        CLASSIFIER,
        ['--out', 'a.onnx', '--backbone', '--cfg-options', 'model.backbone.region_grid=auto'],
        "py: region_grid='auto' .* give the size as --shape, or region_grid as a number",
    ),
    'another format': (CLASSIFIER, ['--out', 'a.pt2'], '--out a.pt2: .* must end in .onnx'),
    'a file that exists': (CLASSIFIER, ['--out', 'there.onnx'], 'there.onnx exists already'),
    'a folder that is a file': (CLASSIFIER, ['--out', 'there.onnx/a.onnx'], 'another --out'),
    'too small': (
        'configs/biformer_stl_nchw_in1k.py', ['--out', 'a.onnx', '--shape', '75', '11'],
        '--shape 75 11: this model needs images of at least 12x12 pixels',
    ),
    'no checkpoint': (CLASSIFIER, ['none.pth', '--out', 'a.onnx'], 'there is no file none.pth'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_refused_before_anything_is_written(case, tool, tmp_path, monkeypatch):
    base, args, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    config = toy_config(tmp_path, base)
    if case == 'too small':  # patches are not padded by this layout
        config.write_text(
            config.read_text().replace(
                "'topks'", "'layout': 'swin', 'padding': 'projected', 'topks'"
            )
        )
    Path('there.onnx').touch()
    with pytest.raises(CommandError, match=message):
        tool('export_onnx.py', config, *args)
    assert {path.name for path in tmp_path.iterdir()} == {config.name, 'there.onnx'}


def test_without_onnx(tool, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        'importlib.util.find_spec', lambda name: None if name == 'onnx' else find_spec(name)
    )
    with pytest.raises(CommandError, match=r"^onnx not installed; .* extra 'export'"):
        tool('export_onnx.py', ROOT / CLASSIFIER, '--out', tmp_path / 'a.onnx')


@pytest.mark.parametrize('backbone_only', [False, True])
def test_stl_and_stl_nchw_are_told_apart(backbone_only, tmp_path):
    """By a mark beside the weights, which are the same in names and shapes."""
    pytest.importorskip('mmpretrain')
    init_default_scope('mmpretrain')
    config = Config.fromfile(ROOT / 'configs/biformer_stl_in1k.py')
    torch.save(dict(state_dict=build_model(config).state_dict()), tmp_path / 'stl.pth')
    build_exportable(config, backbone_only, str(tmp_path / 'stl.pth'))
    other = Config.fromfile(ROOT / 'configs/biformer_stl_nchw_in1k.py')
    with pytest.raises(CheckpointError, match="lepe_source='input', the model has 'value'"):
        build_exportable(other, backbone_only, str(tmp_path / 'stl.pth'))


def test_checkpoint_of_another_model(tool, tmp_path):
    config = toy_config(tmp_path, CLASSIFIER)
    out = tmp_path / 'a.onnx'
    checkpoint, bad = tmp_path / 'model.pth', tmp_path / 'bad.pth'
    save_checkpoint(toy_config(tmp_path, 'configs/debiformer_t_in1k.py'), checkpoint)
    with pytest.raises(CheckpointError, match=r'model\.pth: .* is of a DeBiFormer'):
        tool('export_onnx.py', config, checkpoint, '--out', out)
    model = save_checkpoint(config, checkpoint)
    name = 'backbone.stages.0.0.norm1.weight'
    torch.save(dict(state_dict={**model.state_dict(), name: torch.full((32,), torch.nan)}), bad)
    with pytest.raises(CheckpointError, match=r'bad\.pth: .* is not finite'):
        tool('export_onnx.py', config, bad, '--out', out)
    # MMEngine would leave them at random
    with pytest.raises(CheckpointError, match=r'norm0\.weight is missing'):
        dense = toy_config(tmp_path, 'configs/sfpn_biformer_t_ade20k.py')
        tool('export_onnx.py', dense, checkpoint, '--backbone', '--out', out)
    with pytest.raises(CommandError, match=r'does not fit the config: size mismatch for head'):
        options = ['--cfg-options', 'model.head.num_classes=8']
        tool('export_onnx.py', config, checkpoint, '--out', out, *options)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('head.')}
    torch.save(dict(meta={}, state_dict=state), checkpoint)
    with pytest.raises(CheckpointError, match=r'head\.fc\.weight is missing, head\.fc\.bias'):
        tool('export_onnx.py', config, checkpoint, '--out', out)
    assert not out.exists()


def test_a_wrong_file_is_not_kept(tool, tmp_path, monkeypatch):
    """Written under another name, checked, and only then there."""

    def write(program, path, net):
        assert path != tmp_path / 'a.onnx'
        path.write_bytes(b'half')

    monkeypatch.setattr(export, 'write_onnx', write)
    monkeypatch.setattr(export, 'run_onnx', lambda path: lambda images: [torch.ones(1, 7)])
    monkeypatch.setattr(export, 'trace', lambda net, size: None)
    config = toy_config(tmp_path, CLASSIFIER)
    (tmp_path / 'a.partial.onnx').write_text("the user's own")
    with pytest.raises(CommandError, match='differs from PyTorch'):
        tool('export_onnx.py', config, '--out', tmp_path / 'a.onnx', '--shape', '33')
    assert {path.name for path in tmp_path.iterdir()} == {config.name, 'a.partial.onnx'}
    assert (tmp_path / 'a.partial.onnx').read_text() == "the user's own"


def test_what_a_killed_export_left_goes_with_the_next(tool, tmp_path, monkeypatch):
    seen = []

    def write(program, path, net):
        path.write_bytes(b'half')
        seen.append(sorted(path.relative_to(tmp_path) for path in tmp_path.rglob('*')))
        if len(seen) == 1:
            raise SystemExit

    config = toy_config(tmp_path, CLASSIFIER)
    command = ('export_onnx.py', config, '--out', tmp_path / 'a.onnx', '--shape', '33')
    monkeypatch.setattr(export, 'write_onnx', write)
    monkeypatch.setattr(export, 'run_onnx', lambda path: None)
    monkeypatch.setattr(export, 'check', lambda net, run, size: 'equal')
    monkeypatch.setattr(export, 'trace', lambda net, size: None)
    with monkeypatch.context() as killed:
        killed.setattr('shutil.rmtree', lambda *args, **kwargs: None)
        killed.setattr('tempfile.TemporaryDirectory.cleanup', lambda self: None)
        with pytest.raises(SystemExit):
            tool(*command)
    assert len([*tmp_path.iterdir()]) == 2
    tool(*command)
    assert seen[1] == seen[0]
    assert {path.name for path in tmp_path.iterdir()} == {config.name, 'a.onnx'}


@pytest.mark.slow
def test_package_of_the_command(tool, tmp_path, capsys):
    config = toy_config(tmp_path, CLASSIFIER)
    out = tmp_path / 'logits.pt2'
    tool('export_aoti.py', config, '--out', out, '--shape', '64')
    assert 'no CHECKPOINT is given: the weights are random' in capsys.readouterr().out
    assert run_package(out)(torch.randn(3, 3, 64, 64))[0].shape == (3, 7)


def test_backbone_for_one_size(tool, tmp_path):
    """Also with a grid that depends on the size."""
    config = toy_config(tmp_path, 'configs/upernet_biformer_s_ade20k.py')
    out = tmp_path / 'maps.onnx'
    auto = ('--cfg-options', 'model.backbone.region_grid=auto')
    tool('export_onnx.py', config, '--backbone', '--shape', '64', '96', '--out', out, *auto)
    assert OnnxFile(out).inputs == [('images', ['batch', 3, 64, 96])]
    assert run_onnx(out)(torch.randn(2, 3, 64, 96))[0].shape == (2, 32, 16, 24)


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr('torch._inductor.config.cpp.cxx', ('no-such-compiler',))
    with pytest.raises(CommandError, match=r'there is no working .*as CXX=PATH'):
        write_package(None, tmp_path / 'x.pt2', None)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('family', [BiFormer, DeBiFormer])
def test_batch_norms_fold_into_convolutions(family):
    """As docs/deployment.md says."""
    fuse_conv_bn = pytest.importorskip('mmcv.cnn').fuse_conv_bn
    net = small(family).eval()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
    images = torch.randn(2, 3, 97, 131)
    with torch.no_grad():
        expected = net(images)
        fused = fuse_conv_bn(net)
        assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
        for a, b in zip(fused(images), expected, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
