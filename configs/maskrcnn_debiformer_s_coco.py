# Mask R-CNN, COCO 1x: 12 epochs, 1333x800, 8 GPUs x 1 image, float32.
_base_ = 'maskrcnn_biformer_s_coco.py'

# BatchNorm is trained: the authors' models accept `norm_eval` and ignore it.
model = dict(backbone=dict(type='mmbiformer.DeBiFormer', norm_eval=False))

train_dataloader = dict(batch_size=1)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-5, betas=(0.9, 0.999), weight_decay=0.05),
    # All others decay, including the BatchNorms between stages and the biases.
    paramwise_cfg=dict(
        custom_keys={'norm': dict(decay_mult=0.0), 'rpe_table': dict(decay_mult=0.0)}
    ),
)
# MMEngine's warm-up reaches 1 one iteration before its end
# (findings/mmengine-schedules-end-early.sh): 1501 gives 1 at iteration 1500.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1501),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=8)
