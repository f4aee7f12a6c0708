# RetinaNet, COCO 1x: 12 epochs, 1333x800, 8 GPUs x 2 images, fp16 with a static loss scale.
_base_ = 'retinanet_biformer_s_coco.py'

# As released: the pyramid starts at stride 4, while the anchors keep strides 8 to 128. BatchNorm is
# trained: the authors' models accept `norm_eval` and ignore it.
model = dict(
    backbone=dict(
        type='mmbiformer.DeBiFormer',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
        norm_eval=False,
    ),
    neck=dict(in_channels=[64, 128, 256, 512], add_extra_convs=False),
)

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'bn': dict(decay_mult=0.0), 'norm': dict(decay_mult=0.0)})
)
