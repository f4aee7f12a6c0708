# The drop path rate of this size is not published: 0.1 and 0.4 are ours for T and B.
_base_ = '_base_/biformer_in1k.py'

model = dict(backbone=dict(arch='tiny', drop_path_rate=0.1), head=dict(in_channels=512))
