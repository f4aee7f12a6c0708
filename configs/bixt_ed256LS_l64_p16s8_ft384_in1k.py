_base_ = '_base_/bixt_ft384_in1k.py'

model = dict(backbone=dict(arch='ed256LS_l64_p16s8'), head=dict(in_channels=256))
