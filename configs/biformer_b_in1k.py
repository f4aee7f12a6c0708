# The authors did not publish the drop path rate of this size; 0.4 is ours.
_base_ = '_base_/biformer_in1k.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.4), head=dict(in_channels=768))
