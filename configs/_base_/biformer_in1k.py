# ImageNet-1K classification as DeiT trains: 224x224, 300 epochs, 8 GPUs x 128 images, fp16. The
# config of each model sets its arch, drop path rate and head.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmbiformer.models'], allow_failed_imports=False)
# The inherited setting, written out: inheritance adds a `_scope_` on which MMPretrain's
# browse_dataset fails.
visualizer = dict(
    _delete_=True, type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]
)

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmbiformer.BiFormer', arch='small', region_grid=7, final_norm=True),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=512,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
    ),
    # Each batch gets one of the two, with equal probability.
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

# The authors decode with Pillow, which does not turn an image as its EXIF orientation says.
load_image = dict(type='mmbiformer.LoadImageWithPillow')
train_pipeline = [load_image, *_base_.train_pipeline[1:]]
test_pipeline = [load_image, *_base_.test_pipeline[1:]]

# An epoch of repeated augmentation shows a third of the images, three times each.
train_dataloader = dict(
    batch_size=128,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(_delete_=True, type='RepeatAugSampler', num_repeats=3, shuffle=True),
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=128,
    collate_fn=dict(type='default_collate'),
    dataset=dict(pipeline=test_pipeline),
)
test_dataloader = val_dataloader

tta_model = dict(type='AverageClsScoreTTA')
tta_pipeline = [
    load_image,
    dict(
        type='TestTimeAug',
        transforms=[
            [test_pipeline[1]],
            [test_pipeline[2]],
            [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [dict(type='PackInputs')],
        ],
    ),
]

# No weight decay on norms and biases; no gradient clipping.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    paramwise_cfg=dict(
        _delete_=True, norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0
    ),
)
param_scheduler = [
    dict(
        type='mmbiformer.LaggingCosineLR',
        T_max=300,
        eta_min=1e-5,
        warmup_epochs=5,
        warmup_start=1e-6,
    )
]
auto_scale_lr = dict(enable=False)

# Checkpoints hold the moving average too. The published figures are those of the raw weights.
custom_hooks = [dict(type='mmbiformer.SideEMAHook', momentum=4e-5, update_buffers=True)]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
