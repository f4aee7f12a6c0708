_base_ = '_base_/bixt_in1k.py'

model = dict(backbone=dict(arch='ti_cnv_l64_d13_p8'))
