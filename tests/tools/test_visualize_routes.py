"""The command that draws where a model looks."""

import mmcv
import numpy as np
import pytest

from tests.helpers.configs import ROOT
from tests.helpers.in_process import run_tool

PHOTO = ROOT / 'docs' / 'demo' / 'classification.png'


@pytest.mark.parametrize(
    ('config', 'names'),
    [
        ('biformer_t_in1k', ('look', 'blocks')),
        ('upernet_debiformer_s_ade20k', ('look', 'blocks')),
        ('bixt_ti_l64_p16_in1k', ('look',)),
    ],
)
def test_pictures(config, names, tmp_path):
    options = '--shape', 64, 96, '--point', 700, 100, '--head', 1, '--out', tmp_path
    printed = run_tool('visualize_routes', f'configs/{config}.py', PHOTO, *options)
    assert 'the weights are random' in printed
    assert {path.name for path in tmp_path.iterdir()} == {f'{PHOTO.stem}_{x}.png' for x in names}
    for path in tmp_path.iterdir():
        picture = mmcv.imread(path)
        assert min(picture.shape[:2]) > 200 and np.ptp(picture) > 100


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (('--point', 9999, 3), '--point 9999 3 is not in '),
        (('--block', 'stages.9.attn'), '--block stages.9.attn: there is none; there are stages.0.'),
        (('--head', 77), '--head 77: stages.0.1.attn has heads 0 to 1'),
    ],
)
def test_refused(options, message, tmp_path):
    args = 'configs/biformer_t_in1k.py', PHOTO, '--shape', 64, 96, '--out', tmp_path, *options
    assert message in run_tool('visualize_routes', *args, status=2)
    assert not any(tmp_path.iterdir())
