# Classification with BiXT-Ti of single synthetic shapes, 2 CPU cores, random weights.
_base_ = 'biformer_t_shapes.py'

model = dict(
    # The convolutional tokenizer learns from few images.
    backbone=dict(_delete_=True, type='mmbiformer.BiXT', arch='ti_cnv_l64_d13_p8'),
    neck=None,
    head=dict(in_channels=192),
)
