# Mask R-CNN, COCO 1x: 12 epochs, 1333x800, 8 GPUs x 2 images, fp16 with a static loss scale.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmbiformer.models'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmbiformer.BiFormer',
        arch='small',
        region_grid=16,
        drop_path_rate=0.2,
        norm_eval=True,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    loss_scale=512.0,
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # The authors exempt parameters with `norm` in their names. Those are the LayerNorms; the
    # BatchNorms of stem and downsampling and all biases decay.
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
)
# MMEngine's warm-up reaches 1 one iteration before its end
# (findings/mmengine-schedules-end-early.sh): 501 gives 1 at iteration 500.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=501),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
