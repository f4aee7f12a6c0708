# Semantic FPN with BiFormer-T on synthetic shapes, 2 CPU cores, random weights.
_base_ = ['../sfpn_biformer_t_ade20k.py', '_base_/shapes_ade20k.py']

# The backbone is BiFormer-T; neck and head are smaller, so that 2 CPU cores train them quickly.
channels = 96
model = dict(
    data_preprocessor=dict(size=_base_.shapes_crop),
    backbone=dict(region_grid=7, drop_path_rate=0.0),
    neck=dict(out_channels=channels),
    decode_head=dict(
        in_channels=[channels] * 4,
        channels=channels,
        num_classes=len(_base_.shapes_classes),
    ),
)

train_dataloader = _base_.shapes_train_dataloader
val_dataloader = _base_.shapes_val_dataloader
test_dataloader = val_dataloader

iters = 400
train_cfg = dict(max_iters=iters, val_interval=iters // 4)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=0, end=iters),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=iters // 4))
randomness = dict(seed=0)
