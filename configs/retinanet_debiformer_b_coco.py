_base_ = 'retinanet_debiformer_s_coco.py'

model = dict(backbone=dict(arch='base', region_grid=32), neck=dict(in_channels=[96, 192, 384, 768]))
