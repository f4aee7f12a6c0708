"""Token labeling from images to a checkpoint, in one process and in two, and the labels' maker."""

import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmbiformer.commands.runner import build_model
from mmbiformer.datasets.label_maps import parse_label_map
from mmbiformer.shapes import ShapesSpec, make_shapes
from mmbiformer.weights.read import read_checkpoint
from tests.helpers.configs import write_toy
from tests.helpers.in_process import run_tool, train
from tests.helpers.processes import train_together

pytest.importorskip('mmpretrain')

# Nothing is drawn, BatchNorm is frozen, and the optimizer is SGD, as in test_distributed.py.
CHANGES = """
model['backbone'].update(norm_eval=True)
load = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
labelled = [
    dict(type='LoadImageFromFile'),
    dict(type='mmbiformer.LoadLabelMap', root='{data}/labels'),
    dict(
        type='mmbiformer.CropLabelMap',
        transform=dict(
            type='RandomResizedCrop',
            scale=64,
            crop_ratio_range=(1.0, 1.0),
            aspect_ratio_range=(1.0, 1.0),
        ),
        tokens=2,
    ),
    dict(type='PackInputs', algorithm_keys=('token_target',)),
]
train_dataloader = dict(
    batch_size=4,
    dataset=dict(data_root='{data}', pipeline=labelled),
    sampler=dict(shuffle=False),
    **no_workers,
)
val_dataloader = dict(batch_size=4, dataset=dict(data_root='{data}', pipeline=load), **no_workers)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
optim_wrapper = dict(_delete_=True, optimizer=dict(type='SGD', lr=0.05, momentum=0.9))
param_scheduler = []
"""


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
    """A config, and its folder with 20 images and their label maps."""
    folder = tmp_path_factory.mktemp('tokens')
    data = folder / 'data'
    spec = ShapesSpec(size=(64, 64), objects=(1, 1), shape_size=(30, 60), spread=0.2)
    make_shapes(data, 20, 6, spec=spec, progress=False, format='imagenet')
    torch.manual_seed(0)
    for image in data.glob('train/*/*.*'):
        path = data / f'labels/{image.parent.name}/{image.stem}.pt'
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = torch.rand(7, 6, 6).topk(5, dim=0).indices
        torch.save(torch.stack([torch.rand(5, 6, 6) * 9, numbers]).half(), path)
    config = write_toy(folder, 'demo/biformer_t_tokenlabel_shapes', CHANGES.format(data=data))
    return config, folder


def weights(work):
    return read_checkpoint((work / 'last_checkpoint').read_text())['state_dict']


def test_two_processes_equal_one(labelled):
    config, folder = labelled
    two = ('--cfg-options', 'train_dataloader.batch_size=2')
    log, _ = train_together(config, [folder / 'two'] * 2, *two)
    assert re.search(r'loss_pooled: \S+  loss_token: \S+', log)
    train(config, folder / 'one')
    one, two = weights(folder / 'one'), weights(folder / 'two')
    torch.manual_seed(0)
    before = build_model(Config.fromfile(config)).state_dict()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6)
    for name in ('backbone.stages.3.0.mlp.fc2.weight', 'head.fc.weight', 'head.token_fc.weight'):
        assert (one[name] - before[name]).abs().max() > 1e-3


@pytest.mark.parametrize('count', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_mixed_in_several_processes(labelled, count):
    """With MixToken, an average of the weights, and random flips and crops."""
    config, folder = labelled
    mixed = folder / 'mixed.py'
    mixed.write_text(
        f"_base_ = './{config.name}'\n"
        'model = dict(mix_token=1.0)\n'
        "custom_hooks = [dict(type='mmbiformer.SideEMAHook', momentum=0.1)]\n"
        'train_dataloader = dict(batch_size=2)\n'
    )
    log, *_ = train_together(mixed, [folder / f'mixed{count}'] * count)
    assert 'accuracy/top1' in log
    found = read_checkpoint((folder / f'mixed{count}/last_checkpoint').read_text())
    assert all(torch.isfinite(value).all() for value in found['state_dict'].values())
    assert 'module.head.token_fc.weight' in found['ema_state_dict']


def test_missing_map_stops_the_training(labelled, tmp_path):
    config, _ = labelled
    other = tmp_path / 'other.py'
    text = config.read_text().replace('/labels', '/nowhere')
    other.write_text(text)
    printed = train(other, tmp_path / 'work', status=2)
    assert re.search(r'the image \S+ has no label map \S+nowhere/\S+\.pt', printed)


def test_labels_of_a_classifier_of_mmpretrain(labelled, tmp_path):
    """The scores at each place are those of the head on this place alone; their mean is its own."""
    _, folder = labelled
    plain = write_toy(tmp_path, 'demo/biformer_t_shapes')
    model = build_model(Config.fromfile(plain)).eval()
    model.init_weights()
    nn.init.normal_(model.head.fc.weight)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    images, out = folder / 'data/train', tmp_path / 'labels'
    command = ('make_token_labels', images, out, '--config', plain, '--size', 128, '--workers', 0)
    command += ('--checkpoint', tmp_path / 'weights.pth', '--topk', 7, '--device', 'cpu')
    assert '20 of 20' in run_tool(*command)
    paths = sorted(out.rglob('*.pt'))
    assert len(paths) == 20
    path = paths[3]
    (image,) = images.glob(f'{path.parent.name}/{path.stem}.*')
    labels = parse_label_map(path.read_bytes(), 'a')
    assert labels.classes.tolist() == [*range(7)] and labels.scores.shape == (7, 4, 4)

    from PIL import Image

    pixels = np.asarray(Image.open(image).convert('RGB').resize((128, 128), Image.BICUBIC))
    bgr = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)
    with torch.no_grad():
        inputs = model.data_preprocessor(dict(inputs=[bgr]))['inputs']
        scores = model(inputs, mode='tensor')[0]
    # The head is linear, and the mean of what it gives is what it gives for the mean.
    torch.testing.assert_close(labels.scores.mean((1, 2)), scores, rtol=1e-2, atol=2e-2)

    # Only what is missing is made again.
    before = {each: each.stat().st_mtime_ns for each in paths}
    path.unlink()
    assert '19 of 20' in run_tool(*command)
    assert {each for each in paths if each.stat().st_mtime_ns != before[each]} == {path}


@pytest.mark.parametrize('name', ['resnet10t', 'test_vit', 'test_convnext', 'swin_s3_tiny_224'])
def test_labels_of_a_classifier_of_timm(labelled, tmp_path, name):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    images = tmp_path / 'images/ring'
    images.mkdir(parents=True)
    (source,) = [*(labelled[1] / 'data/train').glob('*/*.*')][:1]
    (images / source.name).write_bytes(source.read_bytes())
    command = ('make_token_labels', images.parent, tmp_path / 'out', '--timm', name)
    command += ('--checkpoint', tmp_path / 'weights.pth', '--workers', 0, '--device', 'cpu')
    run_tool(*command)
    (path,) = (tmp_path / 'out/ring').iterdir()
    labels = parse_label_map(path.read_bytes(), 'a')
    side = labels.scores.shape[1]
    assert labels.scores.shape[1:] == (side, side) and side > 1
    assert (labels.scores != 0).sum((0,)).eq(5).all()
