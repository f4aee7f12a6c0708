# Classification with BiFormer-T of single synthetic shapes, 2 CPU cores, random weights.
_base_ = '../biformer_t_in1k.py'

num_classes = 7
model = dict(
    backbone=dict(region_grid=4, drop_path_rate=0.0),  # maps are 16, 8 and 4 tokens wide
    head=dict(num_classes=num_classes, topk=(1,)),
    train_cfg=None,
)

data_preprocessor = dict(num_classes=num_classes)
dataset = dict(type='CustomDataset', data_root='data/shapes_imagenet/', with_label=True)
train_dataloader = dict(
    batch_size=12,
    num_workers=1,
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
    dataset=dict(
        _delete_=True,
        data_prefix='train',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomFlip', prob=[0.3, 0.3], direction=['horizontal', 'vertical']),
            # Most shapes have the hue of their class: hues alone would give an accuracy of 0.9.
            dict(
                type='RandomApply',
                # Any angle: up to half the circle, then another half in half of the cases. hue=0.5
                # would turn hues backwards too, where MMCV 2.1 fails with NumPy 2.
                transforms=[
                    dict(type='ColorJitter', hue=(0.0, 0.5), backend='cv2'),
                    dict(
                        type='RandomApply',
                        transforms=dict(type='ColorJitter', hue=(0.5, 0.5), backend='cv2'),
                        prob=0.5,
                    ),
                ],
                prob=0.3,
            ),
            dict(type='PackInputs'),
        ],
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        data_prefix='val',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

epochs = 2
train_cfg = dict(max_epochs=epochs)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05, fused=True),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end=epochs,
        eta_min=1e-6,
        convert_to_iter_based=True,
    ),
]
custom_hooks = []
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=1, save_best=None))
randomness = dict(seed=0)
