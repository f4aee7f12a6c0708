# ImageNet-1K classification by the command in the authors' README: 224x224, 300 epochs, 8 GPUs x
# 256 images. Unlike BiFormer's recipe it has no repeated augmentation and no moving average, and it
# clips gradients.
_base_ = 'biformer_in1k.py'

model = dict(backbone=dict(type='mmbiformer.DeBiFormer'))

train_dataloader = dict(
    batch_size=256, sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True)
)
# 5e-4 per 512 images of the total batch.
optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.1), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(
        type='mmbiformer.LaggingCosineLR',
        T_max=300,
        eta_min=5e-6,
        warmup_epochs=20,
        warmup_start=1e-6,
    )
]
auto_scale_lr = dict(base_batch_size=2048)
custom_hooks = []
