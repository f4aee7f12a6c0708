_base_ = 'retinanet_debiformer_s_coco.py'

model = dict(backbone=dict(arch='tiny', region_grid=8, drop_path_rate=0.1))
