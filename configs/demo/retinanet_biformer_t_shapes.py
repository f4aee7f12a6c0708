# RetinaNet with BiFormer-T on synthetic shapes, 2 CPU cores, random weights.
_base_ = ['../retinanet_biformer_t_coco.py', '_base_/shapes_coco.py']

# The backbone is BiFormer-T; neck and head are smaller. Shapes are small and training is short, so
# the finest map is used as well, with anchors from 16 pixels. The head has norms because its
# initial weights are meant for 256 channels and would be too small for 64. Anchors are square
# because few shapes are long: three anchors a place learn faster than nine.
channels = 64
model = dict(
    backbone=dict(region_grid=7, drop_path_rate=0.0, norm_eval=False, out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=channels, num_outs=4),
    bbox_head=dict(
        num_classes=len(_base_.shapes_metainfo['classes']),
        in_channels=channels,
        feat_channels=channels,
        stacked_convs=2,
        norm_cfg=dict(type='GN', num_groups=16, requires_grad=True),
        anchor_generator=dict(octave_base_scale=4, ratios=[1.0], strides=[4, 8, 16, 32]),
    ),
    test_cfg=dict(nms_pre=300, max_per_img=30),
)

train_dataloader = _base_.shapes_train_dataloader
val_dataloader = _base_.shapes_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.shapes_val_evaluator
test_evaluator = val_evaluator

epochs = 4
train_cfg = dict(max_epochs=epochs, val_interval=2)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, fused=True),
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end=epochs,
        eta_min=1e-6,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=1))
randomness = dict(seed=0)
