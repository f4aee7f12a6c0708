# The authors published no detector of this size: this is the recipe of S.
_base_ = 'retinanet_biformer_s_coco.py'

model = dict(backbone=dict(arch='tiny'))
