# UperNet with BiFormer-T on synthetic shapes, 2 CPU cores, random weights.
_base_ = ['../upernet_biformer_t_ade20k.py', '_base_/shapes_ade20k.py']

# The backbone is BiFormer-T; the heads are smaller, so that 2 CPU cores train them quickly.
num_classes = len(_base_.shapes_classes)
model = dict(
    data_preprocessor=dict(size=_base_.shapes_crop),
    backbone=dict(region_grid=(5, 6), drop_path_rate=0.0),  # divides the maps of all stages
    # A scale of 1 would leave BatchNorm four values a channel, which is too few. Most pixels are
    # background, which has less weight so that shapes are learnt sooner.
    decode_head=dict(
        channels=64,
        num_classes=num_classes,
        pool_scales=(2, 3),
        dropout_ratio=0.0,
        loss_decode=dict(class_weight=[0.3] + [1.0] * (num_classes - 1)),
    ),
    auxiliary_head=dict(channels=64, num_classes=num_classes, dropout_ratio=0.0),
)

train_dataloader = _base_.shapes_train_dataloader
val_dataloader = _base_.shapes_val_dataloader
test_dataloader = val_dataloader

iters = 400
train_cfg = dict(max_iters=iters, val_interval=iters // 4)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=0, end=iters),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=iters // 4))
randomness = dict(seed=0)
