# Semantic FPN with BiXT-Ti on synthetic shapes, 2 CPU cores, random weights.
_base_ = 'sfpn_biformer_t_shapes.py'

model = dict(
    # The convolutional tokenizer learns from few images.
    backbone=dict(
        _delete_=True,
        type='mmbiformer.BiXT',
        arch='ti_cnv_l64_d13_p8',
        out_type='featmap',
        out_indices=(2, 5, 8, 11),
    ),
    neck=[
        dict(type='Feature2Pyramid', embed_dim=192, rescales=[2, 1, 0.5, 0.25]),
        dict(type='FPN', in_channels=[192] * 4, out_channels=96, num_outs=4),
    ],
)

iters = 300
train_cfg = dict(max_iters=iters, val_interval=iters // 3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=0, end=iters),
]
default_hooks = dict(checkpoint=dict(interval=iters // 3))
