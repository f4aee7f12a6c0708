# Classification with BiXT-Ti of single synthetic shapes, 2 CPU cores, random weights.
_base_ = 'biformer_t_shapes.py'

model = dict(
    # The convolutional tokenizer learns from few images, and 64 tokens need no 64 latents.
    backbone=dict(
        _delete_=True,
        type='mmbiformer.BiXT',
        arch=dict(dim=192, depth=13, num_latents=32, stride=8, tokenizer='conv'),
    ),
    neck=None,
    head=dict(in_channels=192),
)

epochs = 1
train_cfg = dict(max_epochs=epochs)
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
