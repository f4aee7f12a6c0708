"""Kinds of models and configs that only the hosts know: they train, validate and are tested."""

import pytest

from mmbiformer.shapes import ShapesSpec, make_shapes
from tests.helpers.configs import write_toy
from tests.helpers.in_process import run_tool, train
from tests.helpers.processes import train_together
from tests.helpers.toy_training import ARCH, config_text

LAYOUTS = dict(retinanet_biformer='coco', sfpn_biformer='ade20k', biformer='imagenet')
HOOKS = 'val_interval=1)\ndefault_hooks = dict(checkpoint=dict(interval=1, save_best=None))\n'
EPOCH = f'train_cfg = dict(max_epochs=1, {HOOKS}'
DETECTION = """
for each in (train_dataloader, val_dataloader):
    each['dataset'] = dict(data_root=root)
val_evaluator = dict(ann_file=root + 'annotations/instances_val.json')
"""
# The demo's config, and what is changed.
KINDS = {
    'masks of a box head': (
        'retinanet_biformer',
        DETECTION
        + EPOCH
        + """
val_evaluator.update(metric=['bbox', 'segm'])
optim_wrapper = dict(paramwise_cfg=dict(bypass_duplicate=True))
model.update(type='RTMDet', test_cfg=dict(_delete_=True, nms_pre=20, min_bbox_size=0,
    score_thr=0.0, nms=dict(type='nms', iou_threshold=0.6), max_per_img=5, mask_thr_binary=0.5),
    train_cfg=dict(_delete_=True, assigner=dict(type='DynamicSoftLabelAssigner', topk=13),
        allowed_border=-1, pos_weight=-1),
    bbox_head=dict(_delete_=True, type='RTMDetInsSepBNHead', num_classes=7, in_channels=64,
        feat_channels=64, pred_kernel_size=1, norm_cfg=dict(type='BN'),
        anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[4, 8, 16, 32]),
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='GIoULoss'), loss_mask=dict(type='DiceLoss', eps=5e-6)))
""",
    ),
    'proposals without classes': (
        'retinanet_biformer',
        DETECTION
        + EPOCH
        + """
val_evaluator.update(metric='proposal')
model.update(_delete_=True, type='RPN', data_preprocessor=_base_.model.data_preprocessor,
    backbone=dict(type='mmbiformer.BiFormer', arch=dict(
        depths=(1,), embed_dims=(32,), mlp_ratio=1, topks=(1,))),
    neck=dict(type='FPN', in_channels=[32], out_channels=32, num_outs=1),
    rpn_head=dict(type='RPNHead', in_channels=32, feat_channels=32,
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'), loss_bbox=dict(type='L1Loss'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True)),
    train_cfg=dict(rpn=dict(sampler=dict(type='RandomSampler', num=9, pos_fraction=0.5),
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3),
        allowed_border=-1, pos_weight=-1)),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=9, min_bbox_size=0,
        nms=dict(type='nms', iou_threshold=0.7))))
""",
    ),
    'teacher and student': (
        'retinanet_biformer',
        DETECTION
        + f'train_cfg = dict(_delete_=True, by_epoch=False, max_iters=1, {HOOKS}'
        + """
default_hooks['checkpoint'].update(by_epoch=False)
val_cfg = dict(type='TeacherStudentValLoop')
custom_hooks = [dict(type='MeanTeacherHook')]
detector = _base_.model
detector.backbone.arch = TOY
model.update(_delete_=True, type='SemiBaseDetector', detector=detector,
    data_preprocessor=dict(type='MultiBranchDataPreprocessor',
        data_preprocessor=detector.data_preprocessor),
    semi_train_cfg=dict(cls_pseudo_thr=0.9, min_pseudo_bbox_wh=(1, 1)),
    semi_test_cfg=dict(predict_on='teacher'))
model.pop('backbone')
branches = dict(type='MultiBranch', branch_field=['sup', 'unsup_teacher', 'unsup_student'])
pack = dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
    'scale_factor', 'flip', 'flip_direction', 'homography_matrix'))
load = _base_.train_dataloader.dataset.pipeline[:2]
labelled = [*load, dict(branches, sup=pack)]
bare = [load[0], dict(type='LoadEmptyAnnotations'),
        dict(type='Resize', scale=(96, 96), keep_ratio=True), dict(type='RandomFlip', prob=0.0),
        dict(branches, unsup_teacher=[pack], unsup_student=[pack])]
data = dict(_base_.train_dataloader.dataset, data_root=root)
train_dataloader.update(
    sampler=dict(_delete_=True, type='GroupMultiSourceSampler', batch_size=2, source_ratio=[1, 1]),
    batch_sampler=None, dataset=dict(_delete_=True, type='ConcatDataset',
        datasets=[dict(data, pipeline=labelled), dict(data, pipeline=bare)]))
""",
    ),
    'retrieval': (
        'biformer',
        EPOCH
        + """
for each in (train_dataloader, val_dataloader):
    each['dataset'] = dict(data_root=root)
data = dict(batch_size=4, sampler=dict(type='DefaultSampler', shuffle=False), num_workers=0,
            dataset=dict(_base_.val_dataloader.dataset, data_root=root))
model.update(_delete_=True, type='ImageToImageRetriever', prototype=data,
    image_encoder=[dict(_base_.model.backbone, arch=TOY), dict(type='GlobalAveragePooling')],
    head=dict(type='ArcFaceClsHead', num_classes=7, in_channels=512))
model.pop('backbone')
val_evaluator = dict(_delete_=True, type='RetrievalRecall', topk=1)
""",
    ),
    'classes that a transform maps': (
        'sfpn_biformer',
        f'train_cfg = dict(max_iters=1, {HOOKS}'
        + """
model.update(decode_head=dict(num_classes=3), data_preprocessor=dict(size=(96, 96)))
pipeline = [*_base_.train_dataloader.dataset.pipeline]
pipeline.insert(2, dict(type='GroupClasses'))
for each in (train_dataloader, val_dataloader):
    each['dataset'] = dict(data_root=root, pipeline=pipeline)
""",
    ),
}
OWN = """
from mmengine.registry import TRANSFORMS


@TRANSFORMS.register_module(force=True)
class GroupClasses:
    def __call__(self, results):
        results['gt_seg_map'] //= 3
        return results
"""


@pytest.mark.parametrize('kind', KINDS)
def test_trains_and_is_tested(kind, tmp_path, monkeypatch):
    base, changes = KINDS[kind]
    # MMPretrain's recall takes the number of prototypes for that of classes.
    count, objects = (7, (1, 1)) if base == 'biformer' else (2, (2, 4))
    spec = ShapesSpec(size=(96, 96), shape_size=(16, 50), objects=objects)
    make_shapes(tmp_path / 'data', count, count, spec=spec, progress=False, format=LAYOUTS[base])
    (tmp_path / 'own_transform.py').write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    config = write_toy(
        tmp_path,
        f'demo/{base}_t_shapes',
        f"""
from tests.helpers.configs import TOY as toy
custom_imports = dict(imports=['mmbiformer.models', 'own_transform'])
root = '{tmp_path}/data/'
TOY = {{key: value for key, value in toy.items() if key != '_delete_'}}
train_dataloader = dict(batch_size=2, **no_workers)
val_dataloader = dict(batch_size=1, **no_workers)
val_evaluator = dict()
param_scheduler = []
{changes}
test_dataloader, test_evaluator = val_dataloader, val_evaluator
""",
    )
    train(config, tmp_path / 'work')
    (checkpoint,) = (tmp_path / 'work').glob('*_1.pth')
    run_tool('test', config, checkpoint, '--work-dir', tmp_path / 'test')


NEW_STYLE = f"""
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop
from torch.optim import SGD
from torch.utils.data import default_collate

from mmbiformer.models import BiFormer
from tests.helpers.toy_training import ToyDataset, ToyModel

model = dict(type=ToyModel, backbone=dict(type=BiFormer, arch={ARCH}, region_grid=2))
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type=ToyDataset),
                        sampler=dict(type=DefaultSampler, shuffle=True),
                        collate_fn=dict(type=default_collate))
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=1e-3))
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1)
default_hooks = dict(checkpoint=dict(type=CheckpointHook), logger=dict(type=LoggerHook))
"""


def test_classes_and_functions_as_types(tmp_path):
    """A new-style config; our checkpoint hook still takes the place of MMEngine's."""
    config = tmp_path / 'new_style.py'
    config.write_text(NEW_STYLE)
    assert 'mmbiformer.CheckpointHook' in train(config, tmp_path / 'work')
    assert (tmp_path / 'work' / 'epoch_1.pth').is_file()


def test_model_wrapper_of_the_config(tmp_path, monkeypatch):
    """Without it DistributedDataParallel would wait for the idle parameter's gradient."""
    config = tmp_path / 'unused.py'
    config.write_text(
        config_text()
        + """
custom_imports['imports'].append('idle_model')
model.update(type='IdleModel')
model_wrapper_cfg = dict(type='MMDistributedDataParallel', find_unused_parameters=True)
"""
    )
    (tmp_path / 'idle_model.py').write_text(IDLE)
    monkeypatch.syspath_prepend(tmp_path)
    works = tmp_path / 'a', tmp_path / 'b'
    train_together(config, works, '--cfg-options', 'train_cfg.max_epochs=1')
    assert (works[0] / 'epoch_1.pth').is_file()


IDLE = """
import torch
from mmengine.registry import MODELS
from tests.helpers.toy_training import ToyModel


@MODELS.register_module()
class IdleModel(ToyModel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.idle = torch.nn.Parameter(torch.ones(()))
"""
