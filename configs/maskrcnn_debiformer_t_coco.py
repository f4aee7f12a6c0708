# 8 GPUs x 2 images, fp16 with a static loss scale.
_base_ = 'maskrcnn_debiformer_s_coco.py'

model = dict(backbone=dict(arch='tiny', region_grid=8, drop_path_rate=0.1))

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale=512.0, optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=501),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=16)
