# 160k iterations, 4 GPUs x 2 images.
_base_ = 'sfpn_debiformer_s_ade20k.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.4), neck=dict(in_channels=[96, 192, 384, 768])
)

optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3001),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-10, by_epoch=False, begin=0, end=160000),
]
train_cfg = dict(max_iters=160000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
