# Fine-tuning at 384x384, 30 epochs, 8 GPUs x 64 images, from a model trained at 224x224 with its
# classifier: --cfg-options load_from=model_best.pth.tar
_base_ = 'bixt_in1k.py'

model = dict(backbone=dict(drop_path_rate=0.05))
train_pipeline = [
    *_base_.load_image,
    dict(type='torchvision/RandomResizedCrop', size=384, scale=(0.08, 1), interpolation='bicubic'),
    *_base_.augment,
]
test_pipeline = [
    _base_.load_image[0],
    dict(type='ResizeEdge', scale=438, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=384),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
tta_pipeline = [
    _base_.load_image[0],
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

optim_wrapper = dict(optimizer=dict(lr=2.5e-5))
train_cfg = dict(max_epochs=30)
param_scheduler = [
    dict(
        type='mmbiformer.LaggingCosineLR',
        T_max=30,
        eta_min=1e-5,
        warmup_epochs=0,
        warmup_start=1e-6,
        lag=0,
    )
]
auto_scale_lr = dict(base_batch_size=512)
