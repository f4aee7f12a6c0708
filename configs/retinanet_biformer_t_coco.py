# The authors published no detector of this size. The recipe is that of S.
_base_ = 'retinanet_biformer_s_coco.py'

model = dict(backbone=dict(arch='tiny'))
