# Ours: BiXT's authors published no detector. The recipe is that of BiFormer-S; the backbone is the
# authors' 13-block model without its last block.
_base_ = 'retinanet_biformer_s_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmbiformer.BiXT',
        arch='ti_l64_d13_p16s8',
        out_type='featmap',
        drop_path_rate=0.1,
    ),
    neck=[
        dict(type='mmbiformer.MapPyramid', dim=192, scales=(1, 0.5, 0.25)),
        dict(
            type='FPN',
            in_channels=[192] * 3,
            out_channels=256,
            add_extra_convs='on_input',
            num_outs=5,
        ),
    ],
)
