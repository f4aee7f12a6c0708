# Ours: BiXT's authors published no config. The recipe is that of BiFormer-S; the backbone is the
# authors' 13-block model without its last block.
_base_ = 'sfpn_biformer_s_ade20k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmbiformer.BiXT',
        arch='ti_l64_d13_p16s8',
        out_type='featmap',
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
    ),
    neck=[
        dict(type='Feature2Pyramid', embed_dim=192, rescales=[2, 1, 0.5, 0.25]),
        dict(type='FPN', in_channels=[192] * 4, out_channels=256, num_outs=4),
    ],
)
