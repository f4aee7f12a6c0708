_base_ = 'retinanet_biformer_s_coco.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.3), neck=dict(in_channels=[192, 384, 768]))
