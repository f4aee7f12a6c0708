# UperNet, ADE20K: 160k iterations, 512x512, 8 GPUs x 2 images, fp16 with a static loss scale. The
# drop path rate is from a comment in the authors' model; their config does not set it.
_base_ = 'upernet_biformer_s_ade20k.py'

model = dict(backbone=dict(type='mmbiformer.DeBiFormer', drop_path_rate=0.3))
# The backbone keeps BatchNorm; the heads have SyncBN.
sync_bn = None

# After the resize both sides are enlarged to multiples of 32.
align = dict(type='ResizeToMultiple', size_divisor=32)
test_pipeline = [*_base_.test_pipeline[:2], align, *_base_.test_pipeline[2:]]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms.insert(1, [align])

optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'rpe_table': dict(decay_mult=0.0)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=2e-6, by_epoch=False, begin=0, end=3001),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160001),
]
