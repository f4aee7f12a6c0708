"""Promises of every family to the host libraries, above all of those with stages."""

import subprocess
import sys
import textwrap

import pytest
import torch
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmbiformer.models import BiFormer, BiXT, DeBiFormer
from mmbiformer.registry import MODELS
from tests.helpers.backbones import ARCHS, toy

FAMILIES = pytest.mark.parametrize('family', [BiFormer, DeBiFormer])
ALL_FAMILIES = pytest.mark.parametrize('family', [BiFormer, DeBiFormer, BiXT])
BI, DE = ARCHS[BiFormer], ARCHS[DeBiFormer]


def run_alone(code):
    """Run code in a process that has not imported mmbiformer."""
    subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], check=True)


# Parameters with a classifier of 1000 classes, and blocks a stage.
@pytest.mark.parametrize(
    ('family', 'arch', 'params', 'blocks'),
    [
        (BiFormer, 'tiny', 13_142_760, (2, 2, 8, 2)),
        (BiFormer, 'small', 25_536_232, (4, 4, 18, 4)),
        (BiFormer, 'base', 56_804_968, (4, 4, 18, 4)),
        (BiFormer, 'stl', 28_372_552, (2, 2, 6, 2)),
        (BiFormer, 'stl_nchw', 28_372_552, (2, 2, 6, 2)),
        (DeBiFormer, 'tiny', 21_495_598, (2, 2, 8, 2)),
        (DeBiFormer, 'small', 44_008_028, (4, 4, 18, 6)),
        (DeBiFormer, 'base', 95_501_926, (4, 4, 18, 4)),
    ],
)
def test_archs(family, arch, params, blocks):
    with torch.device('meta'):
        net = MODELS.build(dict(type=family.__name__, arch=arch, final_norm=True))
    classifier = (net.norm.num_features + 1) * 1000
    assert sum(p.numel() for p in net.parameters()) + classifier == params
    assert tuple(map(len, net.stages)) == blocks


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_builds_under_any_default_scope(scope):
    host = pytest.importorskip(f'{scope}.registry')
    init_default_scope(scope)
    assert isinstance(
        host.MODELS.build(dict(type='mmbiformer.BiFormer', arch=BI, region_grid=2)), BiFormer
    )
    assert isinstance(MODELS.build(dict(type='BiFormer', arch=BI, region_grid=2)), BiFormer)
    assert 'BiFormer' not in host.MODELS.module_dict
    assert DefaultScope.get_current_instance().scope_name == scope


def test_host_finds_the_package_by_itself():
    pytest.importorskip('mmpretrain')
    run_alone("""
        from mmengine.registry import MODELS, init_default_scope
        init_default_scope('mmpretrain')
        net = MODELS.build(dict(type='mmbiformer.BiFormer', arch='tiny'))
        assert type(net).__module__ == 'mmbiformer.models.biformer'
    """)


def test_imports_need_no_host_library():
    """And bring the reader of checkpoints, also where it comes first."""
    run_alone("""
        import sys
        for name in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'triton'):
            sys.modules[name] = None
        import mmbiformer.weights
        from mmbiformer.registry import MODELS
        MODELS.build(dict(type='BiFormer', arch='tiny'))
        from mmengine.runner import CheckpointLoader
        assert CheckpointLoader._schemes[''].__module__ == 'mmbiformer.weights.loader'
    """)


@FAMILIES
@pytest.mark.parametrize(
    ('kwargs', 'stages', 'norms'),
    [
        (dict(), 4, ['norm0', 'norm1', 'norm2', 'norm3']),
        (dict(out_indices=[0, 2]), 3, ['norm0', 'norm2']),
        (dict(out_indices=-1), 4, ['norm3']),
        (dict(out_indices=1), 2, ['norm1']),
        (dict(final_norm=True), 4, ['norm']),
    ],
)
def test_every_parameter_is_used(family, kwargs, stages, norms):
    net = toy(family, **kwargs)
    assert len(net.stages) == len(net.downsample_layers) == stages
    assert [name for name, _ in net.named_children() if name.startswith('norm')] == norms
    outs = net(torch.randn(2, 3, 64, 96))
    shapes = [(2, 32 * (i + 1), 16 >> i, 24 >> i) for i in net.out_indices]
    assert [tuple(out.shape) for out in outs] == shapes
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad is not None for p in net.parameters())


@FAMILIES
@pytest.mark.parametrize('final_norm', [False, True])
@torch.no_grad()
def test_maps_are_what_mmcv_reads(family, final_norm):
    """RoIAlign takes memory to be NCHW: it would scramble a channels-last map silently."""
    net = toy(family, final_norm=final_norm).eval()
    for images in (torch.randn(2, 3, 64, 96), torch.randn(2, 3, 64, 96).permute(0, 1, 3, 2)):
        assert all(out.is_contiguous() for out in net(images))


@FAMILIES
@torch.no_grad()
def test_no_images_and_no_values(family):
    assert [len(out) for out in toy(family).eval()(torch.randn(0, 3, 64, 64))] == [0] * 4
    outs = toy(family).to('meta')(torch.empty(2, 3, 64, 96, device='meta'))
    assert [tuple(out.shape[2:]) for out in outs] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@ALL_FAMILIES
@pytest.mark.parametrize('in_channels', [1, 5])
def test_images_of_other_channels(family, in_channels):
    net = toy(family, in_channels=in_channels)
    net(torch.randn(2, in_channels, 32, 32))
    with pytest.raises(ValueError, match=rf'shape \(B, {in_channels}, H, W\), got \(2, 3, 32, 32'):
        net(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    ('kwargs', 'least'),
    [
        (dict(), (1, 1)),
        (dict(arch=dict(BI, layout='swin')), (32, 32)),
        (dict(arch=dict(BI, layout='swin'), out_indices=(0, 1)), (8, 8)),
        (dict(padding='projected'), (17, 17)),
        (dict(padding='projected', region_grid=(2, 3)), (17, 33)),
        (dict(arch='stl_nchw', region_grid=7), (112, 112)),
    ],
)
@torch.no_grad()
def test_smallest_images(kwargs, least):
    net = toy(**kwargs).eval()
    assert net.min_size == least
    net(torch.randn(1, 3, *least))
    if least > (1, 1):
        with pytest.raises(ValueError, match=f'too small, this model needs at least {least[0]}x'):
            net(torch.randn(1, 3, least[0] - 1, least[1]))


@FAMILIES
@pytest.mark.parametrize('frozen', [-1, 0, 2, 4])
def test_frozen_stages(family, frozen):
    net = toy(family, frozen_stages=frozen)
    for _ in range(2):
        for i in range(4):
            parts = [net.downsample_layers[i], net.stages[i], getattr(net, f'norm{i}')]
            for j, part in enumerate(parts):
                expected = i < frozen or (i == j == 0 and frozen == 0)
                assert part.training != expected
                assert all(p.requires_grad != expected for p in part.parameters())
        assert net.train() is net
    assert not any(module.training for module in net.eval().modules())


@FAMILIES
def test_norm_eval(family):
    net = toy(family, norm_eval=True).train()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) == 5
    assert not any(norm.training for norm in norms)
    assert net.stages[0][0].training
    assert all(norm.training for norm in toy(family).modules() if isinstance(norm, _BatchNorm))


@FAMILIES
def test_drop_path_rises_linearly(family):
    net = toy(family, drop_path_rate=0.4)
    pair = 2 if family is DeBiFormer else 1
    rates = [block.drop_path.drop_prob for stage in net.stages for block in stage]
    assert rates == pytest.approx([0.1 * i for i in range(5) for _ in range(pair)])
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(net(x)[3], net(x)[3])
    net.eval()
    assert torch.equal(net(x)[3], net(x)[3])


@FAMILIES
def test_checkpointing_changes_nothing(family, monkeypatch):
    x = torch.randn(2, 3, 64, 64)
    recomputed, grads = [], []
    plain = torch.utils.checkpoint.checkpoint

    def note(block, *args, **kwargs):
        recomputed.append(block)
        return plain(block, *args, **kwargs)

    monkeypatch.setattr('mmbiformer.models.hierarchical.checkpoint', note)
    for with_cp in (False, True):
        torch.manual_seed(0)
        net = toy(family, with_cp=with_cp)
        sum(out.square().sum() for out in net(x)).backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(map(torch.equal, *grads))
    assert recomputed == [block for stage in net.stages for block in stage]


@FAMILIES
def test_layer_depth(family):
    net, pair = toy(family), 2 if family is DeBiFormer else 1
    last = 5 * pair + 1
    depths = {
        'downsample_layers.0.0.weight': 0,
        'stages.0.0.norm1.weight': 1,
        'downsample_layers.2.0.weight': 2 * pair + 1,
        'stages.2.0.norm1.weight': 2 * pair + 1,
        'stages.3.0.mlp.fc1.bias': 4 * pair + 1,
        'norm2.weight': last,
    }
    for name, depth in depths.items():
        assert net.get_layer_depth(name) == (depth, last + 1)
        assert net.get_layer_depth(f'backbone.{name}', 'backbone.') == (depth, last + 1)
    assert net.get_layer_depth('head.fc.weight', 'backbone.') == (last, last + 1)


@ALL_FAMILIES
def test_deterministic(family):
    torch.use_deterministic_algorithms(True)
    try:
        x, grads = torch.randn(2, 3, 64, 64), []
        for _ in range(2):
            torch.manual_seed(0)
            net = toy(family)
            sum(out.square().sum() for out in net(x)).backward()
            grads.append([p.grad for p in net.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *grads))


def test_initialization():
    """BiFormer draws linear layers as its authors do; DeBiFormer keeps PyTorch's values."""
    layer = toy().stages[3][0].mlp.fc1
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not layer.bias.any()
    layer = toy(DeBiFormer).stages[3][0].mlp.fc1
    assert layer.weight.std().item() == pytest.approx((3 * layer.in_features) ** -0.5, rel=0.05)
    assert layer.bias.any()


def test_parts_of_an_arch():
    swin = toy(arch=dict(BI, layout='swin', lepe_source='value'))
    assert swin.stages[0][0].pos_embed is None
    assert isinstance(swin.downsample_layers[1][0], nn.BatchNorm2d)
    assert 'stages.3.0.attn.value_lepe.weight' in swin.state_dict()
    assert ARCHS[BiFormer] == BI
    assert {norm.eps for norm in toy(DeBiFormer).children() if hasattr(norm, 'eps')} == {1e-5}


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='large'), "arch='large' is unknown; choose one of .*'small'"),
        (dict(arch=dict(depths=(1,))), "needs .*'embed_dims'.* got .*'depths'"),
        (dict(arch=dict(BI, widths=1)), 'may have'),
        (dict(arch=dict(BI, depths=(1, 1))), 'one entry a stage'),
        (dict(arch=dict(BI, embed_dims=(30, 64, 96, 128))), 'must be multiples of 32'),
        (dict(arch=dict(BI, layout='swan')), "layout='swan' must be"),
        (dict(out_indices=(0, 4)), r'out_indices=\(0, 4\) must be rising stage numbers'),
        (dict(out_indices=(2, 1)), 'must be rising'),
        (dict(out_indices='3'), "out_indices='3' must be an int"),
        (dict(final_norm=True, out_indices=(0, 3)), 'final_norm=True gives the last map only'),
        (dict(drop_path_rate=1.0), r'drop_path_rate=1.0 must lie in \[0, 1\)'),
        (dict(frozen_stages=5), 'frozen_stages=5 must lie between -1 and the 4'),
        (dict(family=DeBiFormer, arch='stl'), "arch='stl' is unknown; choose one of .*'small'"),
        (dict(family=DeBiFormer, arch=dict(DE, groups=(1, 2))), 'groups.* one entry a stage'),
        (dict(family=DeBiFormer, padding='projected'), "padding='projected' is unknown"),
        (dict(family=DeBiFormer, arch='tiny', region_grid=6), 'topk=49 does not fit the 36'),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        toy(**kwargs)
