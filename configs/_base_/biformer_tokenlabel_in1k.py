# ImageNet-1K classification with token labels. BiFormer's authors published figures, but not how
# they trained. The model is theirs. That the training is LV-ViT's (arXiv 2104.10858, its script) is
# our choice, and so are the sampler, the ends of the schedule and the weight of the tokens' loss: 1
# as in LV-ViT's script; its paper has 0.5.
_base_ = 'biformer_in1k.py'
custom_imports = dict(
    imports=['mmbiformer.models', 'mmbiformer.models.token_labeling'], allow_failed_imports=False
)

model = dict(
    type='mmbiformer.TokenLabelClassifier',
    neck=None,
    head=dict(type='mmbiformer.TokenLabelHead', token_loss_weight=1.0),
    mix_token=1.0,  # instead of Mixup and CutMix
    train_cfg=None,
)

# The maps of LV-ViT's label data, or those of tools/make_token_labels.py: CLASS/NAME.pt.
load_labels = dict(type='mmbiformer.LoadLabelMap', root='data/imagenet_token_labels')
load_image, crop, flip, augment, erase = _base_.train_pipeline[:5]
# The crop comes last, so that whatever moves the image moves its whole map.
train_pipeline = [
    load_image,
    load_labels,
    dict(type='mmbiformer.MoveLabelMap', transform=flip),
    dict(type='mmbiformer.MoveLabelMap', transform=augment),
    dict(type='mmbiformer.CropLabelMap', transform=crop, tokens=7),
    erase,
    dict(type='PackInputs', algorithm_keys=('token_target',)),
]
train_dataloader = dict(
    dataset=dict(pipeline=train_pipeline),
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
)

optim_wrapper = dict(optimizer=dict(lr=1.6e-3))
custom_hooks = [dict(type='mmbiformer.SideEMAHook', momentum=8e-5, update_buffers=True)]
