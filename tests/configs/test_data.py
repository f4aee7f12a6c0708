"""The data of each recipe: augmentation, test size, test-time augmentation, mixing, averages."""

import numpy as np
import pytest
import torch
from mmengine.model import convert_sync_batchnorm
from torch import nn

from tests.helpers.configs import RECIPES, build_without_memory, load

IMAGENET, COCO, ADE20K = (
    [name for name in RECIPES if name.endswith(data) and 'tokenlabel' not in name]
    for data in ('in1k', 'coco', 'ade20k')
)


def transforms(pipeline):
    """A pipeline without loading and packing, as one function of a dict."""
    from mmcv.transforms import Compose

    skip = ('LoadImageFromFile', 'LoadAnnotations', 'Pack')
    return Compose([step for step in pipeline if not step['type'].startswith(skip)])


def image(height, width):
    img = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return dict(img=img, img_shape=(height, width), ori_shape=(height, width))


@pytest.mark.parametrize('name', IMAGENET)
def test_imagenet(name):
    cfg = load(name)
    train, test = cfg.train_dataloader, cfg.test_dataloader
    repeated = dict(type='RepeatAugSampler', num_repeats=3, shuffle=True)
    plain = dict(type='DefaultSampler', shuffle=True)
    assert train.sampler == (plain if name.startswith('debiformer') else repeated)
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
        assert transforms(pipeline)(image(300, 400))['img'].shape == (224, 224, 3)


@pytest.mark.parametrize('name', ['biformer_s_in1k', 'debiformer_s_in1k'])
def test_imagenet_mixing_and_loss(name):
    cfg = load(name)
    cfg.model.data_preprocessor = cfg.data_preprocessor
    model = build_without_memory(cfg)
    mixing = model.data_preprocessor.batch_augments
    assert mixing.probs is None  # one of the two for each batch, evenly
    assert [(type(a).__name__, a.alpha) for a in mixing.augments] == [('Mixup', 0.8), ('CutMix', 1)]
    scores, target = torch.randn(2, 1000), nn.functional.one_hot(torch.tensor([3, 5]), 1000)
    expected = -((0.9 * target + 0.1 / 1000) * scores.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(model.head.loss_module(scores, target), expected)


@pytest.mark.parametrize('name', IMAGENET)
def test_imagenet_average(name):
    hooks = load(name).custom_hooks
    if name.startswith('debiformer'):
        assert hooks == []
        return
    (hook,) = hooks
    assert hook.type == 'mmbiformer.SideEMAHook'
    assert (1 - hook.momentum, hook.update_buffers) == (pytest.approx(0.99996), True)


def test_token_labels():
    """LV-ViT's script: no mixing of pixels, one image once an epoch, its average."""
    cfg, plain = load('biformer_s_tokenlabel_in1k'), load('biformer_s_in1k')
    load_image, crop, flip, augment, erase, _ = plain.train_dataloader.dataset.pipeline
    steps = cfg.train_dataloader.dataset.pipeline
    assert [steps[0], *(steps[i].transform for i in (2, 3, 4)), steps[5]] == [
        load_image,
        flip,
        augment,
        crop,
        erase,
    ]
    assert (steps[4].tokens, steps[6].algorithm_keys) == (224 // 32, ('token_target',))
    assert cfg.train_dataloader.sampler == dict(type='DefaultSampler', shuffle=True)
    assert cfg.test_dataloader == plain.test_dataloader
    cfg.model.data_preprocessor = cfg.data_preprocessor
    model = build_without_memory(cfg)
    assert model.data_preprocessor.batch_augments is None
    assert (model.mixing.alpha, model.head.token_loss_weight) == (1.0, 1.0)
    assert model.head.loss_module.label_smooth_val == 0.1
    (hook,) = cfg.custom_hooks
    assert (1 - hook.momentum, hook.update_buffers) == (pytest.approx(0.99992), True)


@pytest.mark.parametrize('name', COCO)
def test_coco(name):
    cfg = load(name)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        done = transforms(loader.dataset.pipeline[:3])(image(480, 640))
        assert done['img'].shape == (800, 1067, 3)
    assert cfg.train_dataloader.batch_sampler.type == 'AspectRatioBatchSampler'
    if 'retinanet' in name:
        (augment,) = cfg.tta_pipeline[1:]
        assert [len(choices) for choices in augment.transforms] == [1, 2, 1, 1]


def aligns(name):
    """Whether both sides of a test image are enlarged to multiples of 32."""
    return name.startswith('sfpn') or 'debiformer' in name


@pytest.mark.parametrize('name', ADE20K)
def test_ade20k(name):
    cfg = load(name)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    resize = steps['RandomResize']
    assert (tuple(resize.scale), tuple(resize.ratio_range)) == ((2048, 512), (0.5, 2.0))
    assert tuple(steps['RandomCrop'].crop_size) == (512, 512)
    assert tuple(cfg.model.data_preprocessor.size) == (512, 512)
    assert cfg.model.test_cfg.mode == 'whole'
    tested = transforms(cfg.test_dataloader.dataset.pipeline)(image(333, 500))
    assert tested['img'].shape[:2] == (512, 800 if aligns(name) else 769)
    assert cfg.val_dataloader.dataset.pipeline == cfg.test_dataloader.dataset.pipeline


@pytest.mark.parametrize('name', [name for name in ADE20K if '_s_' in name])
def test_ade20k_test_time_augmentation(name):
    """Ratios of the test size 2048x512, each as it is and flipped."""
    from mmseg.registry import TRANSFORMS

    augment = load(name).tta_pipeline[1]
    augment.transforms = augment.transforms[:-2]  # without annotations and packing
    results = TRANSFORMS.build(augment)(image(333, 500))
    sizes = [img.shape[:2] for img in results['img']]
    heights = [256, 384, 512, 640, 768, 896]
    assert sorted(height for height, _ in sizes) == sorted(heights * 2)
    assert all(side % 32 == 0 for size in sizes for side in size) == aligns(name)
    assert sorted(results['flip']) == [False] * 6 + [True] * 6


@pytest.mark.parametrize('name', [name for name in ADE20K if '_s_' in name])
def test_sync_batch_norm(name):
    """BiFormer's backbone is converted with the heads; DeBiFormer's keeps BatchNorm."""
    cfg = load(name)
    model = build_without_memory(cfg)
    if cfg.sync_bn is not None:
        model = convert_sync_batchnorm(model, cfg.sync_bn)
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kind = nn.BatchNorm2d if 'debiformer' in name else nn.SyncBatchNorm
    assert {type(norm) for norm in norms} == {kind}
    assert nn.BatchNorm2d not in {type(m) for m in model.decode_head.modules()}


@pytest.mark.parametrize('name', RECIPES)
def test_other_recipes_convert_no_norm(name):
    assert (load(name).get('sync_bn') == 'torch') == (name in ADE20K and 'debiformer' not in name)
