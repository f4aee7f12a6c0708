# The demo: Mask R-CNN with BiFormer-T on synthetic shapes, 2 CPU cores, random weights.
_base_ = ['../maskrcnn_biformer_t_coco.py', '_base_/shapes_coco.py']

num_classes = len(_base_.shapes_metainfo['classes'])

# The backbone is BiFormer-T; neck and heads are smaller, so that 2 CPU cores train them quickly.
# The first stage has 40x48 tokens in a 7x7 grid. BatchNorm is trained because the weights start
# random. Many small batches learn more than few large ones.
channels = 96
roi_layer = dict(sampling_ratio=2)
model = dict(
    backbone=dict(region_grid=7, drop_path_rate=0.0, norm_eval=False),
    neck=dict(out_channels=channels, num_outs=4),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, finest_scale=28, roi_layer=roi_layer),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=num_classes),
        mask_roi_extractor=dict(out_channels=channels, finest_scale=28, roi_layer=roi_layer),
        mask_head=dict(
            num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=num_classes
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=30)),
)

train_dataloader = _base_.shapes_train_dataloader
val_dataloader = _base_.shapes_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.shapes_val_evaluator
test_evaluator = val_evaluator

epochs = 3
train_cfg = dict(max_epochs=epochs)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-4, weight_decay=0.05),
    # The first fully connected layer has so many inputs that its units die at the full rate.
    paramwise_cfg=dict(
        custom_keys={'norm': dict(decay_mult=0.0), 'shared_fcs': dict(lr_mult=0.25)}
    ),
    clip_grad=dict(max_norm=5.0),
)
# 400 images make 600 iterations: the recipe's warm-up of 500 would take nearly all of them.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end=epochs,
        eta_min=1e-6,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=1))
randomness = dict(seed=0)
