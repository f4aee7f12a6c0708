"""The backbone: its contract with the host libraries."""

import subprocess
import sys
import textwrap

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmbiformer.models import BiFormer
from mmbiformer.registry import MODELS

TOY = dict(depths=(1, 1, 2, 1), embed_dims=(32, 64, 96, 128), mlp_ratio=2, topks=(1, 2, 4, None))


def toy(**kwargs):
    return BiFormer(**{**dict(arch=TOY, region_grid=2), **kwargs})


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base', 'stl', 'stl_nchw'])
def test_archs(arch):
    net = MODELS.build(dict(type='BiFormer', arch=arch)).eval()
    with torch.no_grad():
        outs = net(torch.randn(1, 3, 224, 256))
    widths = (96, 192, 384, 768) if arch in ('base', 'stl', 'stl_nchw') else (64, 128, 256, 512)
    sizes = ((56, 64), (28, 32), (14, 16), (7, 8))
    assert [tuple(out.shape) for out in outs] == [
        (1, width, *size) for width, size in zip(widths, sizes, strict=True)
    ]


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_builds_under_any_default_scope(scope):
    """In a process of its own that has not imported mmbiformer."""
    pytest.importorskip(scope)
    code = f"""
        from mmengine.registry import init_default_scope
        import {scope}
        from {scope}.registry import MODELS
        init_default_scope('{scope}')
        net = MODELS.build(dict(type='mmbiformer.BiFormer', arch='tiny'))
        assert type(net).__module__ == 'mmbiformer.models.biformer'
        assert 'BiFormer' not in MODELS.module_dict
    """
    subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], check=True)


def test_import_needs_no_host_library():
    code = """
        import sys
        for name in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'triton'):
            sys.modules[name] = None
        import mmbiformer.models
        from mmbiformer.registry import MODELS
        MODELS.build(dict(type='BiFormer', arch='tiny'))
    """
    subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], check=True)


@pytest.mark.parametrize(
    ('out_indices', 'stages', 'norms'),
    [
        (None, 4, ['norm0', 'norm1', 'norm2', 'norm3']),
        ((1, 2, 3), 4, ['norm1', 'norm2', 'norm3']),
        ([0, 2], 3, ['norm0', 'norm2']),
        (-1, 4, ['norm3']),
        (1, 2, ['norm1']),
    ],
)
def test_nothing_goes_unused(out_indices, stages, norms):
    given = list(out_indices) if isinstance(out_indices, list) else out_indices
    net = toy(out_indices=given)
    assert given == out_indices
    assert len(net.stages) == len(net.downsample_layers) == stages
    assert [name for name, _ in net.named_children() if name.startswith('norm')] == norms
    outs = net(torch.randn(2, 3, 64, 64))
    assert len(outs) == len(norms)
    sum(out.sum() for out in outs).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_classification():
    net = toy(final_norm=True)
    assert isinstance(net.norm, nn.BatchNorm2d)
    assert not hasattr(net, 'norm3')
    (out,) = net(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 128, 2, 3)
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize('frozen', [-1, 0, 2, 4])
def test_frozen_stages(frozen):
    net = toy(frozen_stages=frozen)
    assert net.train() is net
    for i in range(4):
        parts = [net.downsample_layers[i], net.stages[i], getattr(net, f'norm{i}')]
        for j, part in enumerate(parts):
            expected = i < frozen or (i == j == 0 and frozen == 0)
            assert part.training != expected
            assert all(p.requires_grad != expected for p in part.parameters())
    assert not any(module.training for module in net.eval().modules())


def test_norm_eval():
    net = toy(norm_eval=True).train()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) == 5
    assert not any(norm.training for norm in norms)
    assert net.stages[0][0].training
    before = [norm.running_mean.clone() for norm in norms]
    net(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(a, b.running_mean) for a, b in zip(before, norms, strict=True))
    assert all(norm.training for norm in toy().train().modules() if isinstance(norm, _BatchNorm))


def test_drop_path_rises_linearly():
    net = toy(drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in net.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    x = torch.randn(4, 3, 64, 64)
    assert not torch.equal(net(x)[3], net(x)[3])
    net.eval()
    assert torch.equal(net(x)[3], net(x)[3])


def test_checkpointing_changes_nothing():
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        net = toy(with_cp=with_cp)
        net(x)[3].square().sum().backward()
        grads.append([p.grad for name, p in net.named_parameters() if 'norm0' not in name])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize('padding', ['input', 'projected', 'mask'])
@pytest.mark.parametrize('size', [(65, 97), (150, 211)])
def test_odd_sizes(padding, size):
    net = toy(padding=padding).eval()
    outs = net(torch.randn(1, 3, *size))
    for out, stride in zip(outs, (4, 8, 16, 32), strict=True):
        assert out.shape[2:] == tuple(-(-n // stride) for n in size)
        assert out.isfinite().all()


def test_maps_are_what_mmcv_reads():
    """RoIAlign takes memory to be NCHW: a channels-last map would be scrambled silently."""
    for out in toy()(torch.randn(2, 3, 64, 64)):
        assert out.is_contiguous()


def test_flops_can_be_counted():
    """MMEngine's counter traces the model."""
    with torch.no_grad():
        info = get_model_complexity_info(toy().eval(), (3, 64, 64), show_table=False)
    assert info['flops'] > 0


def test_builds_whatever_the_default_scope_is():
    host = pytest.importorskip('mmdet.registry')
    init_default_scope('mmdet')
    assert isinstance(MODELS.build(dict(type='BiFormer', arch=TOY, region_grid=2)), BiFormer)
    assert isinstance(host.MODELS.build(dict(type='mmbiformer.BiFormer')), BiFormer)


def test_arch_dict_is_left_alone():
    arch = dict(TOY)
    toy(arch=arch)
    assert arch == TOY


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='large'), "arch='large' is unknown; choose one of .*'small'"),
        (dict(arch=dict(depths=(1,))), "needs .*'embed_dims'.* got .*'depths'"),
        (dict(arch=dict(TOY, widths=1)), 'may have'),
        (dict(arch=dict(TOY, depths=(1, 1))), 'one entry a stage'),
        (dict(arch=dict(TOY, embed_dims=(30, 64, 96, 128))), 'must be multiples of 32'),
        (dict(arch=dict(TOY, layout='swan')), "layout='swan' must be"),
        (dict(out_indices=(0, 4)), r'out_indices=\(0, 4\) must be rising stage numbers'),
        (dict(out_indices=(2, 1)), 'must be rising'),
        (dict(final_norm=True, out_indices=(0, 3)), 'final_norm=True gives the last map only'),
        (dict(drop_path_rate=1.0), r'drop_path_rate=1.0 must lie in \[0, 1\)'),
        (dict(backend='cuda'), "backend='cuda' is unknown; choose one of"),
        (dict(frozen_stages=5), 'frozen_stages=5 must lie between -1 and the 4'),
        (dict(region_grid=1), 'topk=2 does not fit the 1 regions'),
        (dict(region_grid=7.0), 'region_grid=7.0 must be a positive int'),
        (dict(out_indices='3'), "out_indices='3' must be an int"),
        (dict(padding='zeros'), "padding='zeros' is unknown"),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        toy(**kwargs)


def test_default_scope_is_not_changed():
    before = DefaultScope.get_current_instance()
    toy()
    assert DefaultScope.get_current_instance() is before
