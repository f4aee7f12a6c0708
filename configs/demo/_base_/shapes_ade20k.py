# Synthetic shapes as semantic maps in ADE20K's layout, for segmentors.
# The names are prefixed because MMEngine refuses two bases that set the same name.
shapes_classes = (
    *('background', 'disc', 'rectangle', 'triangle'),
    *('star', 'ring', 'cross', 'crescent'),
)
shapes_crop = (160, 192)

shapes_train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        type='BaseSegDataset',
        data_root='data/shapes_ade20k/',
        metainfo=dict(classes=shapes_classes),
        reduce_zero_label=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', reduce_zero_label=True),
            dict(type='RandomFlip', prob=[0.3, 0.3], direction=['horizontal', 'vertical']),
            dict(type='PackSegInputs'),
        ],
    ),
)
shapes_val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    dataset=dict(
        type='BaseSegDataset',
        data_root='data/shapes_ade20k/',
        metainfo=dict(classes=shapes_classes),
        reduce_zero_label=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', reduce_zero_label=True),
            dict(type='PackSegInputs'),
        ],
    ),
)
