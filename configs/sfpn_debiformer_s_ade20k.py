# Semantic FPN, ADE20K: 320k iterations, 512x512, 4 GPUs x 2 images, fp16 with a static loss scale.
_base_ = 'sfpn_biformer_s_ade20k.py'

model = dict(backbone=dict(type='mmbiformer.DeBiFormer'))
# The backbone keeps BatchNorm; the head has SyncBN.
sync_bn = None

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=9001),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-10, by_epoch=False, begin=0, end=320000),
]
train_cfg = dict(max_iters=320000, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))
auto_scale_lr = dict(base_batch_size=8)
