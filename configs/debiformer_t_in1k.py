_base_ = '_base_/debiformer_in1k.py'

model = dict(backbone=dict(arch='tiny', drop_path_rate=0.0), head=dict(in_channels=512))
