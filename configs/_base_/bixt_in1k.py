# ImageNet-1K classification by the command in BiXT's README and its script's defaults: 224x224, 800
# epochs, 8 GPUs x 128 images, fp16. Unlike BiFormer's recipe it has LAMB, binary cross-entropy and
# 3-Augment, and neither repeated augmentation nor a moving average.
_base_ = 'biformer_in1k.py'

model = dict(
    backbone=dict(_delete_=True, type='mmbiformer.BiXT', arch='ti_l64_p16'),
    neck=None,
    head=dict(
        in_channels=192,
        # The authors average over the classes, MMPretrain sums over them.
        loss=dict(_delete_=True, type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1 / 1000),
        init_cfg=dict(_delete_=True, type='Constant', layer='Linear', val=0.0, bias=0.0),
    ),
)

# The authors augment with Pillow and torchvision, in RGB.
augment = [
    dict(type='torchvision/RandomHorizontalFlip', p=0.5),
    # 3-Augment: exactly one of the three. torchvision's own blur has a kernel of fixed size.
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='torchvision/Grayscale', num_output_channels=3)],
            [dict(type='torchvision/RandomSolarize', threshold=128, p=1.0)],
            [
                dict(type='PILToNumpy'),
                dict(
                    type='GaussianBlur',
                    magnitude_range=(0.1, 2.0),
                    magnitude_level=10,
                    magnitude_std='inf',
                    prob=1.0,
                ),
                dict(type='NumpyToPIL'),
            ],
        ],
    ),
    dict(type='torchvision/ColorJitter', brightness=0.3, contrast=0.3, saturation=0.3),
    dict(type='PILToNumpy', to_bgr=True),
    dict(type='PackInputs'),
]
load_image = [_base_.load_image, dict(type='NumpyToPIL', to_rgb=True)]
train_pipeline = [
    *load_image,
    dict(type='torchvision/RandomResizedCrop', size=224, scale=(0.08, 1), interpolation='bicubic'),
    *augment,
]
train_dataloader = dict(
    dataset=dict(pipeline=train_pipeline),
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
)

# MMPretrain's LAMB clips the norm of all gradients to 1 inside the step, as the authors' does.
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type='Lamb',
        lr=2.5e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.05,
        trust_clip=True,
        max_grad_norm=1.0,
    ),
)
train_cfg = dict(max_epochs=800)
param_scheduler = [
    dict(
        type='mmbiformer.LaggingCosineLR',
        T_max=800,
        eta_min=1e-5,
        warmup_epochs=5,
        warmup_start=1e-6,
        lag=0,
    )
]
auto_scale_lr = dict(base_batch_size=1024)
custom_hooks = []
# The convolutional tokenizers train with synchronized BatchNorm; the others have none.
sync_bn = 'torch'
