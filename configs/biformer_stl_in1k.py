_base_ = '_base_/biformer_in1k.py'

model = dict(backbone=dict(arch='stl', drop_path_rate=0.1), head=dict(in_channels=768))
