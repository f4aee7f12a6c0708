"""Every recipe trains one step and validates: its whole config, on toy data in its data's place."""

import json
import shutil

import pytest
import torch
from mmengine.hooks import Hook

from mmbiformer.commands import runner as commands_runner
from mmbiformer.shapes import CLASSES, ShapesSpec, make_shapes
from tests.helpers.configs import ENTRIES, IMAGENET_V2, ROOT
from tests.helpers.in_process import train

# Nothing else is changed: data sets, classes, augmentation, model, losses, optimizer, schedule,
# hooks and metrics are the recipe's.
EVERYWHERE = """
train_dataloader.batch_size=2
train_dataloader.num_workers=0
train_dataloader.persistent_workers=False
val_dataloader.num_workers=0
val_dataloader.persistent_workers=False
randomness.seed=0
"""
IMAGENET = """
train_cfg.max_epochs=1
"""
COCO = """
train_cfg.max_epochs=1
train_dataloader.dataset.pipeline.2.scale=(333,200)
val_dataloader.dataset.pipeline.1.scale=(333,200)
"""
ADE20K = """
train_cfg.max_iters=1
train_cfg.val_interval=1
train_dataloader.dataset.pipeline.2.scale=(512,128)
train_dataloader.dataset.pipeline.3.crop_size=(128,128)
model.data_preprocessor.size=(128,128)
val_dataloader.dataset.pipeline.1.scale=(512,128)
"""
# An untrained detector's scores are below the recipe's threshold, and COCO's metric reports nothing
# without a box.
CHANGES = {
    'in1k': IMAGENET,
    'retinanet': COCO + 'model.test_cfg.score_thr=0.0',
    'maskrcnn': COCO + 'model.test_cfg.rcnn.score_thr=0.0',
    'sfpn': ADE20K,
    'upernet': ADE20K,
}
REPORTED = {
    'in1k': {'accuracy/top1', 'accuracy/top5'},
    'retinanet': {'coco/bbox_mAP', 'coco/bbox_mAP_50'},
    'maskrcnn': {'coco/bbox_mAP', 'coco/segm_mAP'},
    'sfpn': {'mIoU', 'aAcc', 'mAcc'},
    'upernet': {'mIoU', 'aAcc', 'mAcc'},
}
# The cheapest of each host. The others take up to half a minute each.
FAST = 'biformer_t_in1k', 'retinanet_biformer_t_coco', 'sfpn_biformer_t_ade20k'
FAST += ('bixt_ti_l64_p16_in1k', 'biformer_s_tokenlabel_in1k')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder whose data/ is laid out, and its classes named, as the recipes expect."""
    from mmdet.datasets import CocoDataset

    folder = tmp_path_factory.mktemp('one_step')
    coco, ade = folder / 'data/coco', folder / 'data/ade/ADEChallengeData2016'
    make_shapes(ade, train=2, val=1, progress=False, format='ade20k')
    make_shapes(coco, train=1, val=1, progress=False)
    for split in ('train', 'val'):
        (coco / split).rename(coco / f'{split}2017')
        path = coco / f'annotations/instances_{split}.json'
        content = json.loads(path.read_text())
        names = enumerate(CocoDataset.METAINFO['classes'], 1)
        content['categories'] = [dict(id=number, name=name) for number, name in names]
        path.with_name(f'instances_{split}2017.json').write_text(json.dumps(content))

    imagenet = folder / 'data/imagenet'
    spec = ShapesSpec(size=(64, 64), shape_size=(40, 60), objects=(1, 1))
    make_shapes(imagenet, train=2, val=2, spec=spec, progress=False, format='imagenet')
    for split in ('train', 'val'):
        for i in range(1000 - len(CLASSES)):
            (imagenet / split / f'n{i:08d}').mkdir()
    for image in imagenet.glob('train/*/*.*'):
        path = folder / f'data/imagenet_token_labels/{image.parent.name}/{image.stem}.pt'
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = torch.rand(1000, 18, 18).topk(5, dim=0).indices
        torch.save(torch.stack([torch.rand(5, 18, 18), numbers]).half(), path)
    return folder


class Watch(Hook):
    """Keeps what a training did."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.rates = [rate for rates in runner.optim_wrapper.get_lr().values() for rate in rates]
        self.stem = next(runner.model.backbone.parameters())
        self.stem_before = self.stem.detach().clone()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.iterations = runner.iter + 1
        self.loss = outputs['loss']
        stepped = runner.optim_wrapper.optimizer.state
        self.idle = [name for name, p in runner.model.named_parameters() if p not in stepped]

    def after_val_epoch(self, runner, metrics=None):
        self.metrics = metrics


@pytest.mark.parametrize(
    'name',
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in ENTRIES
        if name not in IMAGENET_V2
    ],
)
def test_trains_and_validates(name, data, tmp_path, monkeypatch):
    """As ``tools/train.py CONFIG --cfg-options CHANGES`` does beside ``data/``."""
    watch = Watch()

    def build_watched(*args, build_runner=commands_runner.build_runner):
        runner = build_runner(*args)
        runner.register_hook(watch)
        return runner

    task = 'in1k' if name.endswith('in1k') else name.split('_')[0]
    monkeypatch.setattr(commands_runner, 'build_runner', build_watched)
    monkeypatch.chdir(data)
    work, config = tmp_path / 'work', ROOT / f'configs/{name}.py'
    changes = [*EVERYWHERE.split(), *CHANGES[task].split()]
    changes.append(f'visualizer.name={name}')  # MMEngine keeps one of a name for the process
    train(config, work, '--cfg-options', *changes)
    assert (work / 'last_checkpoint').is_file()
    shutil.rmtree(work)  # up to two gigabytes

    assert watch.iterations == 1
    assert torch.isfinite(watch.loss)
    assert min(watch.rates) > 0
    assert not torch.equal(watch.stem, watch.stem_before)
    assert not watch.idle  # distributed training would stop at a parameter without a gradient
    assert REPORTED[task] <= watch.metrics.keys()
