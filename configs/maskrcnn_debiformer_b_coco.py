# 4 GPUs x 2 images, fp16 with a static loss scale.
_base_ = 'maskrcnn_debiformer_s_coco.py'

model = dict(
    backbone=dict(arch='base', region_grid=32, drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale=512.0, optimizer=dict(lr=2.5e-5))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=5001),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
