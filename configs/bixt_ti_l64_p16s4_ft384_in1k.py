_base_ = '_base_/bixt_ft384_in1k.py'

model = dict(backbone=dict(arch='ti_l64_p16s4'))
