# The demo's classification with token labels. Only they are new: there is no MixToken, and all else
# is that of biformer_t_shapes.py. Its model makes the label maps (docs/token_labeling.md).
_base_ = 'biformer_t_shapes.py'
custom_imports = dict(
    imports=['mmbiformer.models', 'mmbiformer.models.token_labeling'], allow_failed_imports=False
)

model = dict(
    type='mmbiformer.TokenLabelClassifier',
    neck=None,
    head=dict(type='mmbiformer.TokenLabelHead'),
    mix_token=None,
)
load_image, flip, colours, pack = _base_.train_dataloader.dataset.pipeline
whole = dict(
    type='RandomResizedCrop', scale=64, crop_ratio_range=(1.0, 1.0), aspect_ratio_range=(1.0, 1.0)
)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            load_image,
            dict(type='mmbiformer.LoadLabelMap', root='data/shapes_imagenet_labels'),
            dict(type='mmbiformer.MoveLabelMap', transform=flip),
            dict(type='mmbiformer.CropLabelMap', transform=whole, tokens=2),
            colours,
            dict(type='PackInputs', algorithm_keys=('token_target',)),
        ]
    )
)
