# The authors published no segmentor of this size: this is the recipe of S.
_base_ = 'sfpn_biformer_s_ade20k.py'

model = dict(backbone=dict(arch='tiny'))
