"""What the checks before a run must leave alone: all that MMEngine and the hosts take."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from torch.optim import SGD
from toy_training import config_text

from mmbiformer.checkpoint import register_safe_loader
from mmbiformer.engine.check_compile import compile_problem
from mmbiformer.engine.checks import (
    CommandError,
    build_model,
    check_apart,
    check_parts,
    check_settings,
    check_testing,
    check_training,
    has_our_backbone,
)
from mmbiformer.engine.command_line import (
    drop_amp_without_gpu,
    make_resumable,
    random_weights_message,
)
from mmbiformer.models import BiFormer
from mmbiformer.safe_load import CheckpointError

HOSTS = {
    'mmdet': [
        'retinanet/retinanet_r18_fpn_1x_coco.py',
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        'yolox/yolox_tiny_8xb8-300e_coco.py',
        'lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py',
        'pascal_voc/retinanet_r50_fpn_1x_voc0712.py',
        'objects365/retinanet_r50-syncbn_fpn_1350k_objects365v1.py',
    ],
    'mmseg': [
        'fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py',
        'unet/unet-s5-d16_fcn_4xb4-40k_drive-64x64.py',
        'segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py',
    ],
    'mmpretrain': [
        'resnet/resnet18_8xb16_cifar10.py',
        'resnet/resnet50_8xb32-mixup_in1k.py',
        'convnext/convnext-tiny_32xb128_in1k.py',
    ],
}


@pytest.mark.parametrize('name', [f'{host}/{name}' for host in HOSTS for name in HOSTS[host]])
def test_configs_of_hosts(name):
    host, _, path = name.partition('/')
    folder = Path(find_spec(host).origin).parent / '.mim/configs'
    cfg = Config.fromfile(folder / path)
    drop_amp_without_gpu(cfg)
    check_settings(cfg)
    check_training(cfg)
    check_testing(cfg)
    check_parts(cfg)


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / 'toy.py').write_text(config_text())
    cfg = Config.fromfile(tmp_path / 'toy.py')
    cfg.work_dir = str(tmp_path / 'work')
    return cfg


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TwoOptimizers:
    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        pass

    def __call__(self, model):
        return OptimWrapperDict(
            **{name: OptimWrapper(SGD(model.parameters(), lr=1.0)) for name in 'ab'}
        )


@pytest.mark.parametrize(
    'schedule', [dict(a=[dict(type='ConstantLR')], b=[]), [dict(type='ConstantLR')]]
)
def test_several_optimizers(cfg, schedule):
    cfg.optim_wrapper = dict(constructor='TwoOptimizers')
    cfg.param_scheduler = schedule
    check_settings(cfg)
    check_parts(cfg)


def test_weights_to_begin_with(cfg, tmp_path):
    """Of other classes, say, but with the whole backbone."""
    state = build_model(copy.deepcopy(cfg)).state_dict()
    cfg.load_from = str(tmp_path / 'x.pth')
    register_safe_loader()
    torch.save(dict(state_dict=dict(state, other=torch.ones(1))), cfg.load_from)
    check_parts(cfg)
    for value in (torch.full((32,), torch.nan), torch.ones(2)):
        state['backbone.stages.0.0.norm2.weight'] = value
        torch.save(dict(state_dict=state), cfg.load_from)
        with pytest.raises(CheckpointError, match=r'x\.pth: .*: stages\.0\.0\.norm2\.weight is'):
            check_parts(cfg)
        check_parts(cfg, ('test',))


def test_what_is_not_used(cfg):
    cfg.test_evaluator = dict(type='Nothing')
    check_parts(cfg, ('train', 'val'))
    with pytest.raises(CommandError, match=r'test_evaluator .* Nothing is not in the metric'):
        check_parts(cfg)
    with pytest.raises(CommandError, match=r'has no test_dataloader = .*testing needs'):
        check_testing(cfg)


@pytest.mark.parametrize(
    'settings',
    [
        dict(log_level=30, visualizer=None, log_processor=None),
        dict(log_level='WARN', randomness=dict(seed=None, deterministic=True), env_cfg={}),
        dict(
            randomness=dict(seed=2**32 - 1, diff_rank_seed=True),
            env_cfg=dict(mp_cfg=dict(mp_start_method='spawn'), dist_cfg=None, resource_limit=9),
            visualizer=dict(
                type='Visualizer',
                vis_backends=dict(type='LocalVisBackend', name='mine', save_dir='x'),
            ),
            log_processor=dict(window_size=5, by_epoch=False, custom_cfg=[]),
        ),
    ],
)
def test_settings_of_the_runner(cfg, settings, tmp_path):
    cfg.merge_from_dict(settings)
    check_settings(cfg)
    check_parts(cfg)
    assert not (tmp_path / 'work').exists() and not (tmp_path / 'x').exists()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(mean=[1, 2, 3], std=[1, 0, 1]), r'std=\[1, 0, 1\] must be .* above 0'),
        (dict(mean=[1, 2, 3], std=[1, -1, 1]), 'std=.* must be finite numbers above 0'),
        (dict(mean=[1, 2, float('nan')], std=[1]), 'mean=.* must be finite numbers$'),
        (dict(mean=[1, 2], std=[1]), r'mean=\[1, 2\] must have one value, or one for each of'),
        (dict(mean=[1], std=[1] * 4), 'std=.* one for each of the 3 channels'),
        (dict(mean=[-1, 2, 3], std=[5]), None),
        (dict(), None),
    ],
)
def test_mean_and_std(cfg, settings, message):
    """With a std of 0 the loss would be nan, and checkpoints be written."""
    import mmpretrain.models  # noqa: F401

    cfg.model.data_preprocessor = dict(type='mmpretrain.ClsDataPreprocessor', **settings)
    if message is None:
        check_parts(cfg)
        return
    with pytest.raises(CommandError, match=rf'toy\.py: data_preprocessor\.{message}'):
        check_parts(cfg)


def test_data_sets_of_others(cfg):
    """Which have arguments of their own under usual names."""
    cfg.train_dataloader.dataset = dict(
        type='ToyDataset', dataset='coco', ann_file=['a.json', 'b.json'], data_root=['x', 'y']
    )
    check_settings(cfg)


def test_types_that_are_classes(cfg):
    """As in new-style configs."""
    cfg = ConfigDict(cfg._cfg_dict)
    cfg.model.backbone.type = BiFormer
    cfg.default_hooks.checkpoint.type = CheckpointHook
    cfg.optim_wrapper.type = AmpOptimWrapper
    assert has_our_backbone(cfg)
    assert 'random weights' in random_weights_message(cfg)
    make_resumable(cfg)
    assert cfg.default_hooks.checkpoint.type == 'mmbiformer.CheckpointHook'
    if drop_amp_without_gpu(cfg):
        assert cfg.optim_wrapper.type == 'OptimWrapper'
    cfg.model.backbone.type = nn.Linear
    assert not has_our_backbone(cfg)


@pytest.mark.parametrize(
    'settings',
    [
        dict(data_root='.', ann_file='a.json', data_prefix=dict(img='images/')),
        dict(data_root='.', ann_file='', data_prefix='images'),
        dict(data_root='.', ann_file='a.json', data_prefix=dict(img='')),
        dict(data_root='', ann_file='a.json'),
        dict(data_root=None),
    ],
)
def test_pictures_beside_the_data(settings, tmp_path, monkeypatch):
    """In the present folder, even if it is the root of the data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'images/old').mkdir(parents=True)
    cfg = Config(dict(train_dataloader=dict(dataset=ConfigDict(type='CocoDataset', **settings))))
    check_apart(cfg, 'work_dirs/look', '--show-dir')
    if settings['data_root']:
        with pytest.raises(CommandError, match='--show-dir images: pictures there could replace'):
            check_apart(cfg, 'images', '--show-dir')


def test_compiled_without_a_compiler(monkeypatch):
    """Only where PyTorch would write C++, and only if it is asked to compile."""
    monkeypatch.setattr('torch._inductor.config.cpp.cxx', ('no-such-compiler',))
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    for settings in (True, {}, dict(mode='default')):
        assert 'C++ compiler' in compile_problem(settings)
    for settings in (None, False, dict(backend='eager'), dict(disable=True)):
        assert compile_problem(settings) is None
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    assert compile_problem(True) is None
