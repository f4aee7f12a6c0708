"""ImageNet's pipelines give the pixels that torchvision's loader, Resize and CenterCrop give."""

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from tests.helpers.configs import RECIPES, load

ORIENTATION = 0x0112  # EXIF's tag
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (31, 45, 4), dtype=np.uint8).repeat(10, 0).repeat(9, 1)
RGB = Image.fromarray(PIXELS[..., :3])
RGBA = Image.fromarray(PIXELS)
PALETTE = RGB.quantize(64)
GREY_16 = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 7)
IMAGES = {
    'rgb.jpg': (RGB, {}),
    'grey.jpg': (RGB.convert('L'), {}),
    'cmyk.jpg': (RGB.convert('CMYK'), {}),
    'rgba.png': (RGBA, {}),
    'grey_alpha.png': (RGBA.convert('LA'), {}),
    'grey_transparent.png': (RGB.convert('L'), dict(transparency=9)),
    'palette.png': (PALETTE, {}),
    'palette_transparent.png': (PALETTE, dict(transparency=3)),
    'palette_alpha.png': (PALETTE, dict(transparency=bytes(range(64)))),
    'palette.gif': (PALETTE, dict(transparency=3)),
    'grey_16.png': (GREY_16, {}),
    'grey_16.tiff': (GREY_16, {}),
    'grey_32.tiff': (Image.fromarray(PIXELS[..., 0].astype(np.int32) * 7), {}),
    'bits.png': (RGB.convert('1'), {}),
}
TURNED = {
    f'{orientation}.{ending}': (picture, orientation)
    for orientation in range(1, 9)
    for ending, picture in (('jpg', RGB), ('cmyk.jpg', RGB.convert('CMYK')), ('png', RGBA))
}


def theirs(path, crop=224):
    """An image as torchvision's ImageFolder and the authors' transforms give it, (H, W, 3)."""
    with Image.open(path) as image:
        image = image.convert('RGB')
    resize = transforms.Resize(int(crop / 0.875), interpolation=InterpolationMode.BICUBIC)
    return np.asarray(transforms.CenterCrop(crop)(resize(image)))


def check_pixels(path, name='biformer_t_in1k', crop=224):
    cfg = load(name)
    tested = Compose(cfg.test_dataloader.dataset.pipeline)(dict(img_path=str(path)))
    assert np.array_equal(tested['inputs'].permute(1, 2, 0).flip(2), theirs(path, crop))
    loaded = Compose(cfg.train_dataloader.dataset.pipeline[:1])(dict(img_path=str(path)))
    with Image.open(path) as image:
        assert np.array_equal(loaded['img'][..., ::-1], image.convert('RGB'))
        assert loaded['img_shape'] == loaded['ori_shape'] == image.size[::-1]


@pytest.mark.filterwarnings('ignore:Palette images with Transparency')  # Pillow's advice
@pytest.mark.parametrize('name', IMAGES)
def test_every_mode(name, tmp_path):
    picture, options = IMAGES[name]
    picture.save(tmp_path / name, **options)
    check_pixels(tmp_path / name)


@pytest.mark.parametrize('name', TURNED)
def test_orientation_is_ignored(name, tmp_path):
    picture, orientation = TURNED[name]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture.save(tmp_path / name, exif=exif)
    check_pixels(tmp_path / name)


@pytest.mark.parametrize('size', [(224, 224), (256, 300), (1, 3), (333, 500), (900, 257), (40, 31)])
def test_every_size(size, tmp_path):
    RGB.resize(size).save(tmp_path / 'image.png')
    check_pixels(tmp_path / 'image.png')


@pytest.mark.parametrize('name', [name for name in RECIPES if name.endswith('in1k')])
def test_every_recipe(name, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    RGBA.convert('LA').save(tmp_path / 'image.png', exif=exif)
    check_pixels(tmp_path / 'image.png', name, 384 if 'ft384' in name else 224)


def test_test_time_augmentation(tmp_path):
    RGBA.convert('LA').save(tmp_path / 'image.png')
    result = Compose(load('biformer_t_in1k').tta_pipeline)(
        dict(img_path=str(tmp_path / 'image.png'))
    )
    plain, flipped = (view.permute(1, 2, 0).flip(2) for view in result['inputs'])
    assert np.array_equal(plain, theirs(tmp_path / 'image.png'))
    assert torch.equal(flipped, plain.flip(1))


def test_loaded_image_stays(tmp_path):
    """The hosts' inferencers load images themselves."""
    img = PIXELS[..., :3]
    done = Compose(load('biformer_t_in1k').test_dataloader.dataset.pipeline)(
        dict(img=img, img_shape=img.shape[:2])
    )
    RGB.save(tmp_path / 'image.png')
    assert np.array_equal(done['inputs'].permute(1, 2, 0), theirs(tmp_path / 'image.png'))
