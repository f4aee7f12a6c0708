"""BiXT's recipes: the published figures, and the host's parts beside the published ones."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.transforms import Compose
from mmengine.optim import build_optim_wrapper
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import nn
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.functional import InterpolationMode, resized_crop

from mmbiformer.commands.fake_data import fake_batch
from mmbiformer.commands.runner import build_model
from mmbiformer.models import BiXT
from tests.configs.test_schedules import learning_rates
from tests.helpers.configs import BIXT, build_without_memory, load, model_of

IMAGENET = [name for name in BIXT if name.endswith('in1k')]
DENSE = [name for name in BIXT if name not in IMAGENET]


@pytest.mark.parametrize('name', IMAGENET)
def test_imagenet(name):
    cfg, tuned = load(name), 'ft384' in name
    arch = name.removeprefix('bixt_').removesuffix('_in1k').removesuffix('_ft384')
    backbone = cfg.model.backbone
    assert (backbone.arch, backbone.get('drop_path_rate', 0)) == (arch, 0.05 if tuned else 0)
    train, test = cfg.train_dataloader, cfg.test_dataloader
    total, epochs, lr = (512, 30, 2.5e-5) if tuned else (1024, 800, 2.5e-3)
    assert train.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == total
    assert train.sampler == dict(type='DefaultSampler', shuffle=True)
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[0].T_max == epochs
    assert cfg.optim_wrapper.optimizer.lr == lr
    assert cfg.custom_hooks == []
    assert [(a.type, a.alpha) for a in cfg.model.train_cfg.augments] == [
        ('Mixup', 0.8),
        ('CutMix', 1.0),
    ]
    size, edge = (384, 438) if tuned else (224, 256)
    steps = {step.type: step for step in train.dataset.pipeline}
    assert 'RandomErasing' not in steps
    crop = steps['torchvision/RandomResizedCrop']
    assert (crop.size, crop.scale, crop.interpolation) == (size, (0.08, 1), 'bicubic')
    _, resize, center, _ = test.dataset.pipeline
    assert (resize.scale, resize.interpolation, center.crop_size) == (edge, 'bicubic', size)
    head = model_of(name).head
    assert head.fc.in_features == (256 if 'ed256' in name else 192)


@pytest.mark.parametrize('name', ['bixt_ti_l64_p16_in1k', 'bixt_ti_l64_p16_ft384_in1k'])
def test_learning_rate(name):
    """Set once an epoch, in time; the cosine is not shifted by the warm-up."""
    cfg = load(name)
    peak, epochs = cfg.optim_wrapper.optimizer.lr, cfg.train_cfg.max_epochs
    warm = 0 if 'ft384' in name else 5

    def expected(t):
        if t < warm:
            return 1e-6 + t * (peak - 1e-6) / warm
        return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * t / epochs)) / 2

    at = [0, 1, 4, 5, 6, epochs // 2, epochs - 1]
    rates = learning_rates(cfg, epoch_length=2, at=[2 * t + i for t in at for i in (0, 1)])
    for t in at:
        assert rates[2 * t] == rates[2 * t + 1] == pytest.approx(expected(t), rel=1e-9)


def test_loss_averages_over_classes():
    cfg = load('bixt_ti_l64_p16_in1k')
    cfg.model.data_preprocessor = cfg.data_preprocessor
    model = build_without_memory(cfg)
    scores, target = torch.randn(4, 1000), torch.rand(4, 1000)
    found = model.head.loss_module(scores, target, avg_factor=len(scores))
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(scores, target))


def test_optimizer_step():
    """LAMB by the published rules: the norm of all gradients is clipped to 1, ratios to 1."""
    cfg = load('bixt_ti_l64_p16_in1k').optim_wrapper
    net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)).double()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    cfg.update(type='OptimWrapper')
    cfg.pop('loss_scale')
    wrapper = build_optim_wrapper(net, cfg)
    for p in net.parameters():
        p.grad = torch.randn_like(p) * 10
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    wrapper.step()
    norm = sum(grad.square().sum() for grad in grads.values()).sqrt()
    for name, p in net.named_parameters():
        grad = grads[name] / norm
        update = grad / (grad.abs() + 1e-8)  # of the first step, both averages corrected
        if name == '0.weight':
            update = update + 0.05 * before[name]
            update = update * min(before[name].norm() / update.norm(), 1)
        torch.testing.assert_close(p.detach(), before[name] - 2.5e-3 * update)


@pytest.mark.parametrize('name', ['bixt_ti_l64_p16_in1k', 'bixt_ed256LS_l64_p16s8_in1k'])
def test_vectors_and_biases_do_not_decay(name):
    model = model_of(name)
    cfg = load(name).optim_wrapper
    cfg.update(type='OptimWrapper')
    cfg.pop('loss_scale')
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    for param_name, p in model.named_parameters():
        spared = p.ndim <= 1 or param_name.endswith('.bias')
        assert decay[id(p)] == (0 if spared else 0.05), param_name


@pytest.mark.parametrize('seed', range(8))
def test_augmented_pixels(seed):
    """The published transforms with the same random numbers, by Pillow."""
    pixels = np.random.default_rng(seed).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((400, 300))
    steps = load('bixt_ti_l64_p16_in1k').train_dataloader.dataset.pipeline[1:-1]

    def seeded():
        torch.manual_seed(seed)
        np.random.seed(seed)

    seeded()
    bgr = np.asarray(image)[..., ::-1]
    found = Compose(steps)(dict(img=bgr, img_shape=bgr.shape[:2]))['img'][..., ::-1]

    seeded()
    box = RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
    x = resized_crop(image, *box, (224, 224), InterpolationMode.BICUBIC)
    if torch.rand(1) < 0.5:
        x = ImageOps.mirror(x)
    choice = np.random.choice(3)
    if choice == 0:
        x = x.convert('L').convert('RGB')
    elif choice == 1:
        torch.rand(1)  # torchvision asks whether to
        x = ImageOps.solarize(x, 128)
    else:
        np.random.rand()
        x = x.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))
    order, *factors, _ = ColorJitter.get_params([0.7, 1.3], [0.7, 1.3], [0.7, 1.3], None)
    enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for i in order.tolist():
        if i < 3:
            x = enhancers[i](x).enhance(factors[i])
    np.testing.assert_array_equal(found, np.asarray(x))


def test_every_augmentation_is_drawn():
    cfg = load('bixt_ti_l64_p16_in1k')
    (choice,) = (s for s in cfg.train_dataloader.dataset.pipeline if s.type == 'RandomChoice')
    assert choice.get('prob') is None  # evenly
    assert len(choice.transforms) == 3


@pytest.mark.parametrize('name', DENSE)
def test_dense(name):
    """The 13-block models without their last block; the strides are those that the hosts expect."""
    model = model_of(name)
    backbone = model.backbone
    task, stride = name.split('_')[0], 4 if 's4' in name else 8
    assert (len(backbone.blocks), backbone.arch['stride']) == (12, stride)
    maps = [torch.empty(1, 192, 256 // stride, 256 // stride, device='meta')]
    neck = model.neck[0] if isinstance(model.neck, nn.Sequential) else model.neck
    strides = [256 // each.shape[-1] for each in neck(maps * len(backbone.out_indices))]
    assert strides == ([8, 16, 32] if task == 'retinanet' else [4, 8, 16, 32])
    like = load(name.replace(f'bixt_ti_p16s{stride}', 'biformer_s'))
    assert load(name).optim_wrapper == like.optim_wrapper


@pytest.mark.parametrize('name', ['bixt_ed256LS_l64_p16s8_in1k', *DENSE])
def test_every_parameter_is_used(name):
    """In one step, with five blocks."""
    cfg, size = load(name), (64, 64)
    backbone = cfg.model.backbone
    arch = dict(BiXT.archs[backbone.arch], depth=5, num_latents=8)
    backbone.update(arch=arch, drop_path_rate=0.0)
    if 'out_indices' in backbone:
        backbone.out_indices = (0, 1, 2, 3)
    if 'rcnn' in (cfg.model.get('train_cfg') or {}):
        cfg.model.train_cfg.rcnn.sampler.num = 16
    if 'size' in cfg.model.get('data_preprocessor', {}):
        cfg.model.data_preprocessor.size = size  # images would be padded to it
    model = build_model(cfg).train()
    data = model.data_preprocessor(fake_batch(cfg, 2, size), training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert [name for name, param in model.named_parameters() if param.grad is None] == []
