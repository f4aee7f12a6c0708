_base_ = '_base_/bixt_in1k.py'

model = dict(backbone=dict(arch='ti_l64_p16s8'))
