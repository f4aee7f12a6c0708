# The authors published no segmentor of this size. The recipe is that of S.
_base_ = 'upernet_biformer_s_ade20k.py'

model = dict(backbone=dict(arch='tiny'))
