# Synthetic shapes in COCO format, for detectors.
# The names are prefixed because MMEngine refuses two bases that set the same name.
shapes_root = 'data/shapes/'
shapes_metainfo = dict(
    classes=('disc', 'rectangle', 'triangle', 'star', 'ring', 'cross', 'crescent')
)
shapes_size = (192, 160)

shapes_train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    dataset=dict(
        data_root=shapes_root,
        metainfo=shapes_metainfo,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        filter_cfg=dict(min_size=8),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='Resize', scale=shapes_size, keep_ratio=True),
            dict(type='RandomFlip', prob=[0.3, 0.3], direction=['horizontal', 'vertical']),
            dict(type='PackDetInputs'),
        ],
    ),
)
shapes_val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        data_root=shapes_root,
        metainfo=shapes_metainfo,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=shapes_size, keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(
                type='PackDetInputs',
                meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
            ),
        ],
    ),
)
shapes_val_evaluator = dict(ann_file=shapes_root + 'annotations/instances_val.json')
