"""What a user meets before anything runs: help, missing data, missing GPUs, the scripts' usage."""

import os
import subprocess
import sys

import pytest

from tests.helpers.configs import ROOT
from tests.helpers.in_process import run_tool

TOOLS = sorted(path.stem for path in ROOT.glob('tools/**/*.py'))


@pytest.mark.parametrize('tool', TOOLS)
def test_help(tool):
    if tool == 'browse_dataset':  # the host's own
        options = [ROOT / 'configs/biformer_t_in1k.py', '--help']
    else:
        options = ['--help']
    assert 'usage: ' in run_tool(tool, *options)


@pytest.mark.parametrize(
    ('tool', 'options'),
    [('train', []), ('test', ['none.pth']), ('browse_dataset', [])],
)
def test_missing_data_is_one_message(tool, options, tmp_path, monkeypatch):
    """Nothing is written."""
    monkeypatch.chdir(tmp_path)
    out = run_tool(tool, ROOT / 'configs/maskrcnn_biformer_s_coco.py', *options, status=2)
    assert out.count('error: the data of ') == 1 and 'Traceback' not in out
    assert 'missing: data/coco/' in out and 'make demo' in out
    assert 'ln -s /path/to/your/data data/coco' in out
    assert not [*tmp_path.iterdir()]


def test_slurm_needs_gpus(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = '{ROOT}/configs/biformer_t_in1k.py'\ntrain_dataloader = None\n")
    options = ['--no-validate', '--launcher', 'slurm', '--work-dir', tmp_path / 'work']
    out = run_tool('train', config, *options, status=2, CUDA_VISIBLE_DEVICES='')
    assert 'error: --launcher slurm: there is no GPU here' in out
    assert 'tools/dist_train.sh' in out


def run_script(name, *options, **environment):
    return subprocess.run(
        [ROOT / 'tools' / name, *options],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHON': sys.executable, **environment},
    )


@pytest.mark.parametrize(
    ('script', 'options'),
    [
        ('dist_train.sh', ['configs/biformer_s_in1k.py']),
        ('dist_train.sh', ['configs/biformer_s_in1k.py', '--amp']),
        ('dist_test.sh', ['configs/biformer_s_in1k.py', '2']),
        ('slurm_train.sh', ['gpu', 'job', 'configs/biformer_s_in1k.py']),
        ('slurm_test.sh', ['gpu', 'job', 'configs/biformer_s_in1k.py']),
    ],
)
def test_scripts_say_how_they_are_called(script, options):
    done = run_script(script, *options)
    assert done.returncode == 2
    assert done.stderr.startswith('usage: ')


@pytest.mark.parametrize(
    ('gpus', 'expected'),
    [
        ('16', '--ntasks 16 --ntasks-per-node 8 --gres gpu:8'),
        ('2', '--ntasks 2 --ntasks-per-node 2 --gres gpu:2'),
    ],
)
@pytest.mark.parametrize('tool', ['train', 'test'])
def test_slurm_scripts(tool, gpus, expected, tmp_path):
    """What they ask of srun, for which a stand-in prints its arguments."""
    for name in ('srun', 'python3'):
        (tmp_path / name).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / name).chmod(0o755)
    done = run_script(
        f'slurm_{tool}.sh',
        *('gpu', 'job', 'config.py', 'place', '--cfg-options', 'a.b=[1, 2]'),
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        GPUS=gpus,
        SRUN_ARGS='--time 2-0',
        PYTHON='python3',
    )
    place = '--work-dir place' if tool == 'train' else 'place'
    first, command = done.stdout.splitlines()
    assert first == '-c import yapf.yapflib.yapf_api'
    assert command == (
        f'--partition gpu --job-name job {expected} --cpus-per-task 5 --kill-on-bad-exit=1 '
        f'--time 2-0 python3 -u {ROOT}/tools/{tool}.py config.py {place} --launcher slurm '
        '--cfg-options a.b=[1, 2]'
    )
