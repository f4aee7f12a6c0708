"""Classifiers, detectors and segmentors under corruptions, and ImageNet-C on disk."""

import json
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmbiformer.commands.runner import build_model
from mmbiformer.datasets import Corrupt
from mmbiformer.shapes import ShapesSpec, make_shapes
from tests.helpers.configs import write_toy, write_toy_maskrcnn
from tests.helpers.in_process import run_tool

pytest.importorskip('imagecorruptions')
SPEC = ShapesSpec(size=(64, 64), shape_size=(20, 50), objects=(1, 1), spread=0.2)
DATA = """
test_dataloader = dict(batch_size=4, dataset=dict(data_root='{data}'), **no_workers)
val_dataloader = test_dataloader
"""


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """A config, its random weights, and its folder with 14 images."""
    folder = tmp_path_factory.mktemp('robust')
    make_shapes(folder / 'data', 7, 14, spec=SPEC, progress=False, format='imagenet')
    changes = DATA.format(data=folder / 'data')
    config = write_toy(folder, 'demo/biformer_t_shapes', changes)
    images = [np.asarray(Image.open(path)) for path in sorted((folder / 'data/val').glob('*/*.*'))]
    return config, save_weights(config, folder, images), folder


def save_weights(config, folder, images=()):
    """Random weights; with images, those of a classifier that does not take all for one class."""
    torch.manual_seed(0)
    model = build_model(Config.fromfile(config)).eval()
    model.init_weights()
    if images:
        batch = [torch.from_numpy(each[..., ::-1].copy()).permute(2, 0, 1) for each in images]
        with torch.no_grad():
            torch.nn.init.normal_(model.head.fc.weight)
            inputs = model.data_preprocessor(dict(inputs=batch))['inputs']
            model.head.fc.bias -= model(inputs).mean(0)
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'weights.pth')
    return folder / 'weights.pth'


def robustness(classifier, work, *options, **kwargs):
    config, weights, _ = classifier
    work = classifier[2] / work
    command = ('test_robustness', config, weights, '--work-dir', work, *options)
    printed = run_tool(*command, **kwargs)
    path = work / 'robustness.json'
    return printed, json.loads(path.read_text()) if path.exists() else None


def test_table_plot_and_resume(classifier):
    options = ('--corruptions', 'noise', 'fog', '--severities', 5, 1)
    printed, found = robustness(classifier, 'work', *options)
    assert '0 of 9 evaluations are there' in printed
    results = found['results']
    assert {name: [*row] for name, row in results.items()} == {
        'clean': ['0'],
        **{n: ['1', '5'] for n in ('gaussian_noise', 'shot_noise', 'impulse_noise', 'fog')},
    }
    # A random classifier, but not always of the same class.
    figures = {row[s]['accuracy/top1'] for row in results.values() for s in row}
    assert len(figures) > 1
    assert re.search(
        r'^fog +\d+\.\d +\d+\.\d +\d+\.\d *$', printed, re.M
    )  # no CE of two severities
    assert found['summary']['mCE'] is None
    with Image.open(classifier[2] / 'work/robustness.png') as picture:
        assert picture.size[0] > 700

    path = classifier[2] / 'work/robustness.json'
    results = json.loads(path.read_text())['results']
    del found['results']['fog']['5']
    path.write_text(json.dumps(found))
    printed, again = robustness(classifier, 'work', *options)
    assert '8 of 9 evaluations are there' in printed
    assert again['results'] == results
    printed, _ = robustness(classifier, 'work', *options)
    assert '9 of 9' in printed and 'Load' not in printed


def test_results_of_something_else_are_kept(classifier):
    options = ('--corruptions', 'fog', '--severities', 1)
    robustness(classifier, 'seeds', *options)
    printed, found = robustness(classifier, 'seeds', *options, '--seed', 1, status=2)
    assert 'has results of another data' in printed
    assert found['data'] == 'on the fly, seed 0'


def test_images_on_disk(classifier):
    """A tree as ImageNet-C's gives what the same corruptions give on the fly."""
    _, _, folder = classifier
    for name in ('contrast', 'gaussian_noise'):
        for severity in (1, 5):
            corrupt = Corrupt(name, severity)
            for path in (folder / 'data/val').glob('*/*.*'):
                img = np.asarray(Image.open(path).convert('RGB'))[..., ::-1]
                img = corrupt.transform(dict(img=img, img_path=str(path)))['img'][..., ::-1]
                out = folder / f'c/{name}/{severity}/{path.parent.name}/{path.stem}.png'
                out.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.ascontiguousarray(img)).save(out)
    options = ('--corruptions', 'gaussian_noise', 'contrast', '--severities', 1, 5)
    _, fly = robustness(classifier, 'fly', *options)
    _, disk = robustness(classifier, 'disk', *options, '--data-root', folder / 'c')
    assert disk['data'] == str(folder / 'c')
    assert disk['results'] == fly['results']
    printed, _ = robustness(classifier, 'none', '--data-root', folder / 'c', status=2)
    assert re.search(r'there is no folder \S+/c/gaussian_noise/2', printed)


@pytest.mark.parametrize('host', ['mmdet', 'mmseg'])
def test_detectors_and_segmentors(host, tmp_path):
    pytest.importorskip(host)
    spec = ShapesSpec(size=(64, 64), shape_size=(10, 50), objects=(2, 4))
    data = tmp_path / 'data'
    if host == 'mmdet':
        make_shapes(data, 1, 2, spec=spec, progress=False)
        changes = 'model.update(test_cfg=dict(rcnn=dict(score_thr=0.0)))'
        config = write_toy_maskrcnn(tmp_path, changes)
    else:
        make_shapes(data, 1, 2, spec=spec, progress=False, format='ade20k')
        config = write_toy(tmp_path, 'demo/sfpn_biformer_t_shapes', DATA.format(data=data))
    weights = save_weights(config, tmp_path)
    options = ('--corruptions', 'fog', 'pixelate', '--severities', 2)
    classifier = config, weights, tmp_path
    printed, found = robustness(classifier, 'work', *options)
    metric = dict(mmdet='coco/bbox_mAP', mmseg='mIoU')[host]
    values = [found['results'][name]['2'].get(metric, 0.0) for name in ('fog', 'pixelate')]
    assert found['summary']['mPC'] == pytest.approx(np.mean(values))
    assert 'mPC' in printed and 'rPC' in printed


def test_imagenet_c_alone(tmp_path, monkeypatch):
    """ImageNet's recipe, a tree with two of its classes, and no clean images."""
    rng = np.random.default_rng(0)
    for name, count in (('n01440764', 2), ('n15075141', 1)):  # the first class and the last
        folder = tmp_path / f'c/fog/3/{name}'
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f'{i}.JPEG')
    changes = 'test_dataloader = dict(batch_size=4, **no_workers)\n'
    config = write_toy(tmp_path, 'biformer_t_in1k', changes)
    weights = save_weights(config, tmp_path)
    state = torch.load(weights)
    state['state_dict']['head.fc.weight'].zero_()
    state['state_dict']['head.fc.bias'].zero_()
    state['state_dict']['head.fc.bias'][999] = 1.0  # always the last class
    torch.save(state, weights)
    monkeypatch.chdir(tmp_path)
    options = ('--corruptions', 'fog', '--severities', 3, '--data-root', tmp_path / 'c')
    printed, found = robustness((config, weights, tmp_path), 'work', *options)
    assert 'Without the clean images' in printed
    assert 'clean' not in found['results']
    assert found['results']['fog']['3']['accuracy/top1'] == pytest.approx(100 / 3)
