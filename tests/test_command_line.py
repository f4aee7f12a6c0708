"""tools/train.py and tools/test.py: what a user meets before anything runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from in_process import run_tool
from mmengine.config import Config

from mmbiformer.engine.command_line import check_record, make_resumable
from mmbiformer.safe_load import CheckpointError

ROOT = Path(__file__).parent.parent


def run(tool, *args, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / tool), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.mark.parametrize(
    ('tool', 'args', 'messages'),
    [
        (
            'train.py',
            ['configs/maskrcnn_biformer_s_coco.py'],
            [
                'missing: data/coco/annotations/instances_train2017.json',
                'missing: data/coco/val2017',
                'ln -s /path/to/your/data data/coco',
                'make demo',
            ],
        ),
        (
            'train.py',
            ['configs/biformer_s_in1k.py'],
            ['missing: data/imagenet/train', 'missing: data/imagenet/val'],
        ),
    ],
)
def test_one_message_and_nothing_written(tool, args, messages, tmp_path):
    for folder in ('configs', 'tools'):
        (tmp_path / folder).symlink_to(ROOT / folder)
    done = run(tool, *args, cwd=tmp_path)
    assert done.returncode == 2
    for message in messages:
        assert message in done.stderr
    assert 'Traceback' not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ['configs', 'tools']


@pytest.mark.parametrize('tool', ['train.py', 'test.py', 'demo.py', 'make_shapes.py'])
def test_help(tool):
    done = run(tool, '--help')
    assert done.returncode == 0
    assert 'usage' in done.stdout


def test_resume_refuses_another_model(tmp_path):
    """MMEngine would log what is missing, and go on with random weights."""
    path = tmp_path / 'other.pth'
    state = {'backbone.conv1.weight': torch.zeros(1)}
    torch.save(dict(meta={}, message_hub={}, optimizer={}, state_dict=state), path)
    cfg = Config(dict(resume=True, load_from=str(path), work_dir=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r'other\.pth.* is not a model around'):
        make_resumable(cfg)


@pytest.mark.parametrize(
    'name', ['biformer_t_in1k', 'maskrcnn_biformer_t_coco', 'demo/upernet_biformer_t_shapes']
)
def test_config_that_a_training_wrote_may_be_replaced(name, tmp_path):
    """A run goes on from it."""
    base = ROOT / f'configs/{name}.py'
    cfg = Config.fromfile(base)
    cfg.work_dir, cfg.launcher = str(tmp_path), 'none'
    check_record(cfg)  # there is none yet
    cfg.dump(tmp_path / base.name)
    check_record(cfg)  # this is another file than the config
    check_record(Config.fromfile(tmp_path / base.name))


WHOLE = dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='localhost', MASTER_PORT='29500')
ENVIRONMENTS = {  # launcher, variables, message
    'docstrings': ('none', dict(PYTHONOPTIMIZE='2'), 'PYTHONOPTIMIZE=2 (or -OO) takes the docstr'),
    'matplotlib': ('none', dict(MPLBACKEND='foo'), "MPLBACKEND='foo' in the environment: "),
    'local rank': ('none', dict(LOCAL_RANK='abc'), "LOCAL_RANK='abc' in the environment must be"),
    'rank': ('pytorch', dict(WHOLE, RANK='abc'), "RANK='abc' in the environment must be an int"),
    'port': ('pytorch', dict(WHOLE, MASTER_PORT='x'), "MASTER_PORT='x' in the environment must"),
    'half': ('pytorch', dict(RANK='0'), 'but not WORLD_SIZE and LOCAL_RANK and MASTER_PORT and M'),
    'too high': ('pytorch', dict(WHOLE, RANK='2'), 'RANK=2 in the environment must be below WORLD'),
}


@pytest.mark.parametrize('name', ENVIRONMENTS)
def test_environment(name, monkeypatch):
    launcher, variables, message = ENVIRONMENTS[name]
    for variable in WHOLE:
        monkeypatch.delenv(variable, raising=False)
    config = ROOT / 'configs/none.py'
    if launcher == 'none' and 'LOCAL_RANK' not in variables:  # Python and matplotlib read it once
        done = run('train.py', config, **variables)
        found = done.stderr
        assert done.returncode == 2
    else:
        found = run_tool('train', config, '--launcher', launcher, status=2, **variables)
    assert found.startswith('error: ') and message in found
