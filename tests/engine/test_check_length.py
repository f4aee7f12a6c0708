"""The hook that warns of a training that is too short to learn."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope

from mmbiformer.engine.hooks import CheckLengthHook

LINEAR = dict(type='LinearLR', start_factor=0.001, by_epoch=False)
LAGGING = dict(type='mmbiformer.LaggingCosineLR', T_max=300, eta_min=1e-5, warmup_start=1e-6)
COSINE = dict(type='CosineAnnealingLR', T_max=900)
QUADRATIC = dict(type='mmdet.QuadraticWarmupLR', by_epoch=True, end=5)


def warnings(schedulers, epochs, iters):
    """The hook's message about a training of so many epochs and iterations."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    default = dict(optimizer=optimizer, epoch_length=iters // epochs)
    with DefaultScope.overwrite_default_scope('mmengine'):
        built = [PARAM_SCHEDULERS.build(dict(each), default_args=default) for each in schedulers]
    said = []
    runner = SimpleNamespace(
        param_schedulers=built,
        train_loop=SimpleNamespace(max_epochs=epochs, max_iters=iters),
        logger=SimpleNamespace(warning=said.append),
    )
    CheckLengthHook().before_train(runner)
    runner.param_schedulers = dict(generator=built, discriminator=[])
    CheckLengthHook().before_train(runner)
    assert said[: len(said) // 2] == said[len(said) // 2 :]
    return said[: len(said) // 2]


@pytest.mark.parametrize(
    ('schedulers', 'expected'),
    [
        ([dict(LINEAR, end=501), COSINE], '501 iterations and the training has 60'),
        ([dict(LINEAR, end=61)], '61 iterations and the training has 60'),
        ([dict(LINEAR, end=60), COSINE], None),
        ([dict(LINEAR, by_epoch=True, end=4)], '4 epochs and the training has 3'),
        ([dict(LINEAR, by_epoch=True, end=4, convert_to_iter_based=True)], '80 iterations'),
        ([dict(LINEAR, by_epoch=True, end=3)], None),
        ([dict(LINEAR, start_factor=1.0, end_factor=0.1, end=900)], None),
        ([dict(type='ConstantLR', factor=0.1, by_epoch=False, end=100)], '100 iterations'),
        ([dict(LAGGING, warmup_epochs=5)], '5 epochs and the training has 3'),
        ([dict(LAGGING, warmup_epochs=2)], None),
        ([dict(type='LinearMomentum', start_factor=0.1, by_epoch=False, end=900)], None),
        ([COSINE, dict(type='MultiStepLR', milestones=[8, 11], end=12)], None),
        ([dict(type='ReduceOnPlateauLR', monitor='loss')], None),
        ([], None),
    ],
)
def test_warm_up(schedulers, expected):
    said = warnings(schedulers, epochs=3, iters=60)
    assert len(said) == (expected is not None)
    assert not expected or expected in said[0]


def test_no_batch():
    (said,) = warnings([dict(LAGGING, warmup_epochs=5)], epochs=3, iters=0)
    assert 'has no batch' in said and 'Lower batch_size' in said


def test_a_warm_up_of_mmdet():
    pytest.importorskip('mmdet')
    assert len(warnings([QUADRATIC], epochs=3, iters=60)) == 1
    assert not warnings([QUADRATIC], epochs=6, iters=120)
