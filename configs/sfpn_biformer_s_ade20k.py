# Semantic FPN, ADE20K: 80k iterations, 512x512, 8 GPUs x 4 images, fp16 with a static loss scale.
# A path instead of 'mmseg::sem_fpn/…', for which MMEngine needs a distribution that is named
# mmsegmentation. OneDL's has another name.
_base_ = (
    __import__('mmseg').__path__[0] + '/.mim/configs/sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'
)
custom_imports = dict(imports=['mmbiformer.models'], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmbiformer.BiFormer',
        arch='small',
        region_grid=8,
        drop_path_rate=0.15,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
# The BatchNorms of the backbone become SyncBN too.
sync_bn = 'torch'

train_dataloader = dict(batch_size=4)
# After the resize both sides are enlarged to multiples of 32.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
# The ratios are those of the test size; the host's own are those of the image.
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(int(2048 * r), int(512 * r)), keep_ratio=True)
                for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [dict(type='ResizeToMultiple', size_divisor=32)],
            [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [dict(type='LoadAnnotations', reduce_zero_label=True)],
            [dict(type='PackSegInputs')],
        ],
    ),
]

optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    loss_scale=512.0,
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4),
)
# MMEngine's warm-up reaches 1 one iteration before its end
# (findings/mmengine-schedules-end-early.sh): 1001 gives 1 at iteration 1000.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=1001),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-8, by_epoch=False, begin=0, end=80000),
]
train_cfg = dict(max_iters=80000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000, max_keep_ckpts=1, save_best='mIoU'))
auto_scale_lr = dict(enable=False, base_batch_size=32)
