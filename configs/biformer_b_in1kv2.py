# Evaluation on ImageNet-V2 (matched frequency). Its folders are named by the numbers of classes.
_base_ = 'biformer_b_in1k.py'

test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmbiformer.ClassFolders',
        data_root='data/imagenetv2-matched-frequency-format-val',
        pipeline=_base_.test_pipeline,
    )
)
