# The authors did not publish the drop path rate of this size; 0.1 is ours.
_base_ = '_base_/biformer_in1k.py'

model = dict(backbone=dict(arch='tiny', drop_path_rate=0.1), head=dict(in_channels=512))
