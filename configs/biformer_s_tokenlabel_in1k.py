_base_ = '_base_/biformer_tokenlabel_in1k.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.15), head=dict(in_channels=512))
