# As with tokens every 8 pixels.
_base_ = 'maskrcnn_bixt_ti_p16s8_coco.py'

model = dict(
    backbone=dict(arch='ti_l64_d13_p16s4'),
    neck=[
        dict(type='mmbiformer.MapPyramid', dim=192, scales=(1, 0.5, 0.25, 0.125)),
        _base_.model.neck[1],
    ],
)
