"""The shipped configs: they build, and hold every published figure."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from goldens import Golden
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import convert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmbiformer.checkpoint import RELEASED, convert_official_state_dict
from mmbiformer.engine.checks import check_parts, check_settings, check_training
from mmbiformer.engine.command_line import drop_amp_without_gpu, drop_sync_bn_without_gpu
from mmbiformer.layers import BiLevelRoutingAttention

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob('configs/**/*.py')
    if '_base_' not in path.parts
)
# By the authors' code: parameters and multiply-adds of the classifiers.
CLASSIFIERS = {
    'tiny': (13_142_760, 2_228_044_160),
    'small': (25_536_232, 4_487_312_640),
    'base': (56_804_968, 9_794_514_816),
    'stl': (28_372_552, 4_589_905_728),
    'stl_nchw': (28_372_552, 4_592_615_248),
}
DROP_PATH = {
    'biformer_t_in1k': 0.1,
    'biformer_s_in1k': 0.15,
    'biformer_b_in1k': 0.4,
    'biformer_stl_in1k': 0.1,
    'biformer_stl_nchw_in1k': 0.1,
    'maskrcnn_biformer_t_coco': 0.2,
    'maskrcnn_biformer_s_coco': 0.2,
    'maskrcnn_biformer_b_coco': 0.3,
    'retinanet_biformer_t_coco': 0.2,
    'retinanet_biformer_s_coco': 0.2,
    'retinanet_biformer_b_coco': 0.3,
    'sfpn_biformer_t_ade20k': 0.15,
    'sfpn_biformer_s_ade20k': 0.15,
    'sfpn_biformer_b_ade20k': 0.3,
    'upernet_biformer_t_ade20k': 0.3,
    'upernet_biformer_s_ade20k': 0.3,
    'upernet_biformer_b_ade20k': 0.4,
}
IMAGENET = [name for name in DROP_PATH if name.endswith('in1k')]
COCO = [name for name in DROP_PATH if name.endswith('coco')]
MASKRCNN, RETINANET, SFPN, UPERNET = (
    [name for name in DROP_PATH if name.startswith(task)]
    for task in ('maskrcnn', 'retinanet', 'sfpn', 'upernet')
)


def load(name):
    path = ROOT / name if name.endswith('.py') else ROOT / 'configs' / f'{name}.py'
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    return cfg


def build(cfg):
    """The model, without memory for its parameters."""
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def in_float32(cfg):
    """MMEngine has no mixed precision without a GPU."""
    wrapper = cfg.optim_wrapper.copy()
    wrapper.update(type='OptimWrapper')
    wrapper.pop('loss_scale')
    return wrapper


@pytest.mark.parametrize('config', CONFIGS)
def test_builds(config):
    cfg = load(config)
    model = build(cfg)
    assert type(model.backbone).__module__.startswith('mmbiformer.models')
    assert cfg.custom_imports['imports'] == ['mmbiformer.models']
    assert cfg.auto_scale_lr['base_batch_size'] > 0
    assert cfg.auto_scale_lr.enable is False


@pytest.mark.parametrize('config', [config for config in CONFIGS if '_t_' in config])
def test_checks_find_nothing(config):
    cfg = load(config)
    drop_amp_without_gpu(cfg)
    check_settings(cfg)
    check_training(cfg)
    check_parts(cfg)


SNIPPETS = [
    text
    for page in ('README.md', 'docs/training.md')
    for text in re.findall(r'```python\n(_base_ = .*?)```', (ROOT / page).read_text(), re.S)
]


@pytest.mark.parametrize('index', range(3))
def test_checks_find_nothing_in_documented_configs(index, tmp_path):
    assert len(SNIPPETS) == 3
    path = tmp_path / 'mine.py'
    path.write_text(SNIPPETS[index].replace("_base_ = '", f"_base_ = '{ROOT}/configs/"))
    test_checks_find_nothing(str(path))


@pytest.mark.parametrize('name', DROP_PATH)
def test_backbone(name):
    """Structure, grid and the stochastic depth of each block, rising linearly from 0."""
    model = build(load(name)).train()
    backbone, task = model.backbone, name.split('_')[0]
    size = name.split('biformer_')[1].removesuffix('_in1k').removesuffix('_coco')
    size = size.removesuffix('_ade20k')
    depths, width = {
        't': ((2, 2, 8, 2), 64),
        's': ((4, 4, 18, 4), 64),
        'b': ((4, 4, 18, 4), 96),
        'stl': ((2, 2, 6, 2), 96),
        'stl_nchw': ((2, 2, 6, 2), 96),
    }[size]
    assert tuple(len(stage) for stage in backbone.stages) == depths
    assert [len(stage[0].norm1.weight) for stage in backbone.stages] == [
        width * 2**i for i in range(4)
    ]
    rates = [block.drop_path.drop_prob for stage in backbone.stages for block in stage]
    assert rates == pytest.approx(np.linspace(0, DROP_PATH[name], sum(depths)), abs=1e-7)
    grids = {m.region_grid for m in backbone.modules() if isinstance(m, BiLevelRoutingAttention)}
    grid = {'biformer': 7, 'maskrcnn': 16, 'retinanet': 16, 'sfpn': 8, 'upernet': 8}[task]
    assert grids == {(grid, grid)}
    assert backbone.final_norm == (task == 'biformer')
    # Detection keeps BatchNorm in eval mode while it trains.
    batch_norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.training for m in batch_norms} == {task not in ('maskrcnn', 'retinanet')}
    assert all(param.requires_grad for param in model.parameters())
    if task == 'upernet':
        assert (model.auxiliary_head.in_channels, model.auxiliary_head.in_index) == (4 * width, 2)
        assert model.auxiliary_head.loss_decode.loss_weight == 0.4


@pytest.mark.parametrize('arch', CLASSIFIERS)
def test_classifier_parameters(arch):
    size = {'tiny': 't', 'small': 's', 'base': 'b'}.get(arch, arch)
    model = build(load(f'biformer_{size}_in1k'))
    assert sum(p.numel() for p in model.parameters()) == CLASSIFIERS[arch][0]


# Batches and optimizers


@pytest.mark.parametrize(
    ('names', 'batch', 'lr', 'decay', 'loss_scale'),
    [
        (IMAGENET, 128, 5e-4 * 1024 / 512, 0.05, 'dynamic'),
        (MASKRCNN, 2, 1e-4, 0.05, 512.0),
        (RETINANET, 2, 1e-4, 1e-4, 512.0),
        (SFPN, 4, 2e-4, 1e-4, 512.0),
        (UPERNET, 2, 6e-5, 0.01, 512.0),
    ],
)
def test_optimizer(names, batch, lr, decay, loss_scale):
    """For 8 GPUs; --auto-scale-lr on 2 divides the rate by 4."""
    for name in names:
        cfg = load(name)
        assert cfg.train_dataloader.batch_size == batch
        assert cfg.auto_scale_lr.base_batch_size == 8 * batch
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
        assert cfg.optim_wrapper.loss_scale == loss_scale
        assert cfg.optim_wrapper.get('clip_grad') is None
        assert cfg.optim_wrapper.get('accumulative_counts', 1) == 1
        wrapper = build_optim_wrapper(nn.Linear(1, 1), in_float32(cfg))
        assert type(wrapper.optimizer) is torch.optim.AdamW
        found = wrapper.optimizer.defaults
        assert (found['lr'], found['weight_decay']) == (pytest.approx(lr), decay)
        assert (tuple(found['betas']), found['eps']) == ((0.9, 0.999), 1e-8)
        cfg.auto_scale_lr.enable = True  # as tools/train.py does
        runner = SimpleNamespace(
            world_size=2,
            _train_dataloader=cfg.train_dataloader,
            param_schedulers=[],
            logger=MMLogger.get_current_instance(),
        )
        Runner.scale_lr(runner, wrapper, cfg.auto_scale_lr)
        for group in wrapper.optimizer.param_groups:
            assert group['lr'] == pytest.approx(lr / 4)


def test_precision(monkeypatch):
    """fp16 with a loss scale that stays, bf16 by one option."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    cfg = load('upernet_biformer_s_ade20k')
    wrapper = build_optim_wrapper(nn.Linear(1, 1), cfg.optim_wrapper)
    assert (wrapper.cast_dtype, wrapper._scale_update_param) == (None, 512.0)
    cfg.merge_from_dict({'optim_wrapper.dtype': 'bfloat16'})
    assert build_optim_wrapper(nn.Linear(1, 1), cfg.optim_wrapper).cast_dtype == torch.bfloat16


def weight_decay(name):
    """Of each parameter of a config's model."""
    cfg = load(name)
    model = build(cfg)
    wrapper = build_optim_wrapper(model, in_float32(cfg))
    decay = {
        id(param): group['weight_decay']
        for group in wrapper.optimizer.param_groups
        for param in group['params']
    }
    return {name: decay[id(param)] for name, param in model.named_parameters()}


def authors_names(golden):
    """The authors' names of the parameters in a golden, with their dimensions, by our names."""
    shapes = Golden(golden).shapes()
    state_dict = {name: torch.empty(shape, device='meta') for name, shape in shapes.items()}
    ours = convert_official_state_dict(state_dict)
    return {
        our: (name, len(shape)) for our, (name, shape) in zip(ours, shapes.items(), strict=True)
    }


def dense_names(name):
    """As :func:`authors_names`, for a whole detector or segmentor."""
    lines = (ROOT / f'tests/data/openmmlab_0x/{name}.txt').read_text().splitlines()
    heads = [line.split()[0] for line in lines if not line.startswith('#')]
    return {
        **{ours: name for ours, (name, _) in authors_names('biformer_small_det').items()},
        **{name: name for name in heads},
    }


@pytest.mark.parametrize(('task', 'decay'), [('maskrcnn', 0.05), ('upernet', 0.01)])
def test_weight_decay_without_norms(task, decay):
    """Exempt is what the authors' names call norm, and nothing else: by parameter."""
    config = f'{task}_biformer_s_' + ('coco' if task == 'maskrcnn' else 'ade20k')
    names = dense_names(f'{task}_biformer_s')
    found = weight_decay(config)
    assert found == {ours: 0.0 if 'norm' in names[ours] else decay for ours in found}
    exempt = {ours for ours, value in found.items() if value == 0}
    # norm1 and norm2 of 30 blocks, and four norms of maps.
    assert len(exempt) == 2 * (2 * 30 + 4)
    assert not any('downsample_layers' in ours or '.bn.' in ours for ours in exempt)


@pytest.mark.parametrize('name', ['retinanet_biformer_s_coco', 'sfpn_biformer_s_ade20k'])
def test_weight_decay_on_everything(name):
    assert set(weight_decay(name).values()) == {1e-4}


def test_weight_decay_of_classifiers():
    """None on vectors and biases, as in timm."""
    for config, golden in (
        ('biformer_s_in1k', 'biformer_small_cls'),
        ('biformer_stl_nchw_in1k', 'biformer_stl_nchw_cls'),
    ):
        names = authors_names(golden)
        expected = {
            ours: 0.0 if ndim == 1 or name.endswith('.bias') else 0.05
            for ours, (name, ndim) in names.items()
            if 'running_' not in name and not name.endswith('num_batches_tracked')
        }
        assert weight_decay(config) == expected


# Schedules


def learning_rates(cfg, iterations, epoch_length=None):
    """Those that the config's own schedulers give, at each iteration."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], cfg.optim_wrapper.optimizer.lr)
    wrapper = OptimWrapper(optimizer)
    schedulers = [
        PARAM_SCHEDULERS.build(
            scheduler, default_args=dict(optimizer=wrapper, epoch_length=epoch_length)
        )
        for scheduler in cfg.param_scheduler
    ]
    rates = []
    optimizer.step = lambda: None
    for i in range(iterations):
        rates.append(optimizer.param_groups[0]['lr'])
        wrapper.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (epoch_length and (i + 1) % epoch_length == 0):
                scheduler.step()
    return rates


def warm_up(i, iterations, ratio):
    """As mmcv 1 has it."""
    return 1 - (1 - min(i / iterations, 1)) * (1 - ratio)


def test_imagenet_schedule():
    for name in IMAGENET:
        cfg = load(name)
        assert (cfg.train_cfg.by_epoch, cfg.train_cfg.max_epochs) == (True, 300)
    rates = learning_rates(cfg, 300, epoch_length=1)
    # The first epoch's rate lasts two: it is set at the end of an epoch, from that epoch's number.
    assert rates[:2] == [1e-6, 1e-6]
    assert rates[2:6] == pytest.approx([1e-6 + t * (1e-3 - 1e-6) / 5 for t in (1, 2, 3, 4)])
    for epoch in (6, 7, 100, 200, 299):
        cosine = (1 + math.cos(math.pi * (epoch - 1) / 300)) / 2
        assert rates[epoch] == pytest.approx(1e-5 + (1e-3 - 1e-5) * cosine, rel=1e-12)
    assert max(rates) == rates[6] < 1e-3


@pytest.mark.parametrize('name', COCO)
def test_coco_schedule(name):
    cfg = load(name)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ('EpochBasedTrainLoop', 12)
    length = 600
    rates = learning_rates(cfg, 12 * length, length)
    for i in (0, 1, 250, 499, 500, 501, 8 * length - 1, 8 * length, 11 * length - 1, 11 * length):
        step = 0.1 ** sum(i // length >= epoch for epoch in (8, 11))
        assert rates[i] == pytest.approx(1e-4 * step * warm_up(i, 500, 0.001), rel=1e-9)


@pytest.mark.parametrize('name', SFPN)
def test_sfpn_schedule(name):
    cfg = load(name)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ('IterBasedTrainLoop', 80_000)
    if name != 'sfpn_biformer_s_ade20k':
        assert cfg.param_scheduler == load('sfpn_biformer_s_ade20k').param_scheduler
        return
    rates = learning_rates(cfg, 80_000)
    for i in (0, 1, 500, 999, 1000, 1001, 40_000, 79_999):
        cosine = 1e-8 + (1 - 1e-8) * (1 + math.cos(math.pi * i / 80_000)) / 2
        assert rates[i] == pytest.approx(2e-4 * cosine * warm_up(i, 1000, 0.1), rel=1e-6)


@pytest.mark.parametrize('name', UPERNET)
def test_upernet_schedule(name):
    cfg = load(name)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ('IterBasedTrainLoop', 160_000)
    if name != 'upernet_biformer_s_ade20k':
        assert cfg.param_scheduler == load('upernet_biformer_s_ade20k').param_scheduler
        return
    rates = learning_rates(cfg, 160_000)
    for i in (0, 1, 750, 1499, 1500, 1501, 80_000, 159_999):
        rate = 6e-5 * (1 - i / 160_000) * warm_up(i, 1500, 1e-6)
        assert rates[i] == pytest.approx(rate, rel=1e-9)


# Data


def transforms(cfg, pipeline):
    """A pipeline without loading and packing, as one function of a dict."""
    from mmcv.transforms import Compose

    init_default_scope(cfg.default_scope)
    skip = ('LoadImageFromFile', 'LoadAnnotations', 'Pack')
    return Compose([step for step in pipeline if not step['type'].startswith(skip)])


def image(height, width):
    img = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return dict(img=img, img_shape=(height, width), ori_shape=(height, width))


def test_imagenet_data():
    cfg = load('biformer_s_in1k')
    train, test = cfg.train_dataloader, cfg.test_dataloader
    assert train.sampler == dict(type='RepeatAugSampler', num_repeats=3, shuffle=True)
    # As many iterations as the authors' sampler gives, which drops what does not fill a batch.
    assert train.drop_last
    steps = {step.type: step for step in train.dataset.pipeline}
    crop, augment, erase = (
        steps[name] for name in ('RandomResizedCrop', 'RandAugment', 'RandomErasing')
    )
    assert (crop.scale, crop.interpolation) == (224, 'bicubic')
    assert (augment.policies, augment.num_policies) == ('timm_increasing', 2)
    assert (augment.magnitude_level, augment.total_level, augment.magnitude_std) == (9, 10, 0.5)
    assert (erase.erase_prob, erase.mode) == (0.25, 'rand')
    assert 'ColorJitter' not in steps
    resize, center = test.dataset.pipeline[1:3]
    assert (resize.scale, resize.edge, resize.interpolation) == (256, 'short', 'bicubic')
    assert center.crop_size == 224
    for pipeline in (train.dataset.pipeline, test.dataset.pipeline):
        assert transforms(cfg, pipeline)(image(300, 400))['img'].shape == (224, 224, 3)


def test_imagenet_mixing_and_loss():
    cfg = load('biformer_s_in1k')
    cfg.model.data_preprocessor = cfg.data_preprocessor
    model = build(cfg)
    mixing = model.data_preprocessor.batch_augments
    assert mixing.probs is None  # one of the two for each batch, evenly
    assert [(type(a).__name__, a.alpha) for a in mixing.augments] == [('Mixup', 0.8), ('CutMix', 1)]
    scores, target = torch.randn(2, 1000), nn.functional.one_hot(torch.tensor([3, 5]), 1000)
    expected = -((0.9 * target + 0.1 / 1000) * scores.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(model.head.loss_module(scores, target), expected)


def test_imagenet_average():
    (hook,) = load('biformer_s_in1k').custom_hooks
    assert hook.type == 'mmbiformer.SideEMAHook'
    assert (1 - hook.momentum, hook.update_buffers) == (pytest.approx(0.99996), True)


@pytest.mark.parametrize('name', COCO)
def test_coco_data(name):
    cfg = load(name)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        done = transforms(cfg, loader.dataset.pipeline[:3])(image(480, 640))
        assert done['img'].shape == (800, 1067, 3)
    assert cfg.train_dataloader.batch_sampler.type == 'AspectRatioBatchSampler'
    if 'retinanet' in name:
        (augment,) = cfg.tta_pipeline[1:]
        assert [len(choices) for choices in augment.transforms] == [1, 2, 1, 1]


@pytest.mark.parametrize('name', SFPN + UPERNET)
def test_ade20k_data(name):
    cfg = load(name)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    resize = steps['RandomResize']
    assert (tuple(resize.scale), tuple(resize.ratio_range)) == ((2048, 512), (0.5, 2.0))
    assert tuple(steps['RandomCrop'].crop_size) == (512, 512)
    assert tuple(cfg.model.data_preprocessor.size) == (512, 512)
    assert cfg.model.test_cfg.mode == 'whole'
    tested = transforms(cfg, cfg.test_dataloader.dataset.pipeline)(image(333, 500))
    # Keeping the ratio gives 512x769; Semantic FPN then aligns to multiples of 32.
    assert tested['img'].shape[:2] == ((512, 800) if name in SFPN else (512, 769))
    assert cfg.val_dataloader.dataset.pipeline == cfg.test_dataloader.dataset.pipeline
    assert cfg.sync_bn == 'torch'


@pytest.mark.parametrize('name', ['sfpn_biformer_s_ade20k', 'upernet_biformer_s_ade20k'])
def test_sync_batch_norm(name):
    """Backbone and heads: SyncBN in distributed training, plain where there is no GPU."""
    cfg = load(name)
    kinds = {type(m) for m in convert_sync_batchnorm(build(cfg), cfg.sync_bn).modules()}
    assert nn.SyncBatchNorm in kinds
    assert nn.BatchNorm2d not in kinds
    told = drop_sync_bn_without_gpu(cfg)
    if torch.cuda.is_available():
        return
    assert told == 'No GPU: training with BatchNorm in each process instead of SyncBN.'
    assert drop_sync_bn_without_gpu(cfg) is None
    assert 'sync_bn' not in cfg
    kinds = {type(m) for m in build(cfg).modules()}
    assert nn.BatchNorm2d in kinds
    assert nn.SyncBatchNorm not in kinds


@pytest.mark.parametrize('name', ['sfpn_biformer_s_ade20k', 'upernet_biformer_s_ade20k'])
def test_ade20k_test_time_augmentation(name):
    """Ratios of the test size 2048x512, each as it is and flipped."""
    cfg = load(name)
    init_default_scope('mmseg')
    augment = cfg.tta_pipeline[1].copy()
    augment.transforms = augment.transforms[:-2]  # without annotations and packing
    from mmseg.registry import TRANSFORMS

    results = TRANSFORMS.build(augment)(image(333, 500))
    sizes = sorted(img.shape[:2] for img in results['img'])
    heights = [256, 384, 512, 640, 768, 896]
    if name.startswith('upernet'):
        assert [height for height, _ in sizes] == sorted(heights * 2)
    else:
        assert all(side % 32 == 0 for size in sizes for side in size)
        assert [height for height, _ in sizes] == sorted(heights * 2)
    assert sorted(results['flip']) == [False] * 6 + [True] * 6


# Metafiles


def models():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    files = [yaml.safe_load((ROOT / path).read_text()) for path in index['Import']]
    collections = [c['Name'] for file in files for c in file['Collections']]
    assert len(collections) == len({*collections})
    entries = [entry for file in files for entry in file['Models']]
    assert {entry['In Collection'] for entry in entries} <= {*collections}
    return {entry['Config']: entry for entry in entries}


def test_metafiles_list_the_configs():
    shipped = {config for config in CONFIGS if Path(config).parent.name == 'configs'}
    assert models().keys() == shipped
    names = [entry['Name'] for entry in models().values()]
    assert len(names) == len({*names})


def test_metafiles_say_where_weights_and_figures_are_from():
    for arch, (parameters, macs) in CLASSIFIERS.items():
        size = {'tiny': 't', 'small': 's', 'base': 'b'}.get(arch, arch)
        entry = models()[f'configs/biformer_{size}_in1k.py']
        assert entry['Metadata'] == {'FLOPs': macs, 'Parameters': parameters}
        assert entry['Weights'] == entry['Converted From']['Weights'] == RELEASED[arch]
    for config, entry in models().items():
        published = entry['Provenance'] == 'published by the authors'
        assert published == ('Results' in entry), config


@pytest.mark.parametrize(
    ('config', 'figures'),
    [
        ('biformer_t_in1k', [81.4]),
        ('biformer_s_in1k', [83.8, 96.638]),
        ('biformer_b_in1k', [84.3]),
        ('biformer_stl_in1k', [82.7]),
        ('biformer_stl_nchw_in1k', [82.7]),
        ('maskrcnn_biformer_s_coco', [47.8, 43.2]),
        ('maskrcnn_biformer_b_coco', [48.6, 43.7]),
        ('retinanet_biformer_s_coco', [45.9]),
        ('retinanet_biformer_b_coco', [47.1]),
        ('sfpn_biformer_s_ade20k', [48.9]),
        ('sfpn_biformer_b_ade20k', [49.9]),
        ('upernet_biformer_s_ade20k', [49.8, 50.8]),
        ('upernet_biformer_b_ade20k', [51.0, 51.7]),
        ('debiformer_t_in1k', [81.9]),
        ('debiformer_s_in1k', [83.9]),
        ('debiformer_b_in1k', [84.4]),
        ('maskrcnn_debiformer_s_coco', [47.5, 42.5]),
        ('maskrcnn_debiformer_b_coco', [48.5, 43.2]),
        ('retinanet_debiformer_s_coco', [45.6]),
        ('retinanet_debiformer_b_coco', [47.1]),
        ('sfpn_debiformer_b_ade20k', [50.6]),
        ('upernet_debiformer_b_ade20k', [51.4, 52.0]),
    ],
)
def test_published_figures(config, figures):
    entry = models()[f'configs/{config}.py']
    found = [v for result in entry['Results'] for v in result['Metrics'].values()]
    assert found == figures
