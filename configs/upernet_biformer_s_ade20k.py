# UperNet, ADE20K: 160k iterations, 512x512, 8 GPUs x 2 images, fp16 with a static loss scale.
# A path instead of 'mmseg::upernet/…', for which MMEngine needs a distribution that is named
# mmsegmentation. OneDL's has another name.
_base_ = (
    __import__('mmseg').__path__[0]
    + '/.mim/configs/upernet/upernet_r50_4xb4-160k_ade20k-512x512.py'
)
custom_imports = dict(imports=['mmbiformer.models'], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmbiformer.BiFormer',
        arch='small',
        region_grid=8,
        drop_path_rate=0.3,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
# The BatchNorms of the backbone become SyncBN too.
sync_bn = 'torch'

train_dataloader = dict(batch_size=2)
# The ratios are those of the test size; the host's own are those of the image.
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(int(2048 * r), int(512 * r)), keep_ratio=True)
                for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [dict(type='LoadAnnotations', reduce_zero_label=True)],
            [dict(type='PackSegInputs')],
        ],
    ),
]

optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    loss_scale=512.0,
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # The authors exempt parameters with `norm` in their names. Those are the LayerNorms; the
    # BatchNorms of stem, downsampling and heads and all biases decay.
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
)
# MMEngine's warm-up reaches 1, and its polynomial 0, one iteration before the end. One more makes
# up for it.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160001),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, save_best='mIoU'))
auto_scale_lr = dict(enable=False, base_batch_size=16)
