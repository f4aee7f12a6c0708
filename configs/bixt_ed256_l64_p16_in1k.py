_base_ = '_base_/bixt_in1k.py'

model = dict(backbone=dict(arch='ed256_l64_p16'), head=dict(in_channels=256))
