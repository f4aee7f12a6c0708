"""Set-up of the environment around uv, and packaging: no network, nothing compiled."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mmbiformer
from tests.helpers.configs import ENTRIES

ROOT = Path(__file__).resolve().parents[2]
MIM_PARTS = ('configs', 'tools', 'model-index.yml')
METAFILES = [f'configs/metafile_{data}.yml' for data in ('ade20k', 'coco', 'in1k')]
SHIPPED = ('tools', 'model-index.yml', 'configs/_base_', 'configs/demo', *METAFILES)
DEVELOPER_TOOLS = ('setup_env.sh', 'uv.sh')

# Shell code for what `uv sync --dry-run -v` says.
UP_TO_DATE = 'echo "Would make no changes"'
NEEDS_BUILD = f"""echo "Using CPython 3.11 interpreter at: {sys.executable}"
echo "DEBUG Identified uncached distribution: onedl-mmcv==2.3.6" """
NEEDS_INSTALL = 'echo "DEBUG Registry requirement already cached: onedl-mmcv==2.3.6"'


@pytest.fixture
def project(tmp_path):
    """A folder with the scripts and a stand-in for uv, which does what `plan` and `sync` say."""
    for name in DEVELOPER_TOOLS:
        (tmp_path / 'tools').mkdir(exist_ok=True)
        shutil.copy(ROOT / 'tools' / name, tmp_path / 'tools')
    (tmp_path / '.venv').mkdir()
    (tmp_path / 'sync').write_text('exit 0')
    write_program(
        tmp_path / 'bin' / 'uv',
        'case "$*" in --version) echo uv 99.0;; *--dry-run*) . ./plan;; '
        '*) echo "$*" > arguments; . ./sync;; esac',
    )
    return tmp_path


def write_program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)


def set_up(project, plan, **environment):
    (project / 'plan').write_text(plan)
    return run(project, PATH=f'{project / "bin"}:{os.environ["PATH"]}', **environment)


def run(project, **environment):
    settings = 'CXX', 'FORCE_CUDA', 'PYTHON', 'TORCH_CUDA_ARCH_LIST'
    kept = {key: value for key, value in os.environ.items() if key not in settings}
    return subprocess.run(
        ['/bin/bash', project / 'tools' / 'setup_env.sh'],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_nothing_to_do(project):
    result = set_up(project, UP_TO_DATE)
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')
    assert not (project / 'arguments').exists()


def test_no_python_in_range(project):
    result = set_up(project, 'echo "error: No interpreter found for Python >=3.10, <3.13"; exit 2')
    assert result.returncode == 1
    assert 'No interpreter found' in result.stderr
    assert 'make env PYTHON=/path/to/python3.11' in result.stderr


def test_no_uv_and_no_python(project):
    programs = project / 'programs'
    programs.mkdir()
    for name in ('bash', 'cat', 'cut', 'dirname', 'sort'):
        (programs / name).symlink_to(shutil.which(name))
    result = run(project, PATH=str(programs))
    assert result.returncode == 1
    assert result.stderr.startswith('set-up stopped: it needs uv')
    assert 'make env PYTHON=/path/to/python3.11' in result.stderr


def test_compiler_is_asked_for_only_where_mmcv_is_compiled(project):
    result = set_up(project, NEEDS_BUILD, CXX='false')
    assert result.returncode == 1
    assert 'false cannot compile' in result.stderr and 'apt install g++' in result.stderr
    assert not (project / 'arguments').exists()
    assert set_up(project, NEEDS_INSTALL, CXX='false').returncode == 0
    assert '--locked --extra onedl' in (project / 'arguments').read_text()


def test_failure_shows_the_end_and_the_log(project):
    (project / 'sync').write_text('echo DEBUG noise; echo "  x Failed to build" >&2; exit 2')
    result = set_up(project, NEEDS_INSTALL)
    assert result.returncode == 1
    assert 'Failed to build' in result.stderr and '.venv.log' in result.stderr
    assert 'noise' not in result.stderr
    assert (project / '.venv.log').read_text() == 'DEBUG noise\n  x Failed to build\n'


def test_cuda_operators_have_their_own_wheel_and_stay(project):
    write_program(project / 'bin' / 'nvcc', '')
    setting = '--config-settings-package onedl-mmcv:cuda=9.0'
    for environment, has_setting in (
        ({}, False),
        (dict(FORCE_CUDA='1', TORCH_CUDA_ARCH_LIST='9.0'), True),
        ({}, True),
        (dict(FORCE_CUDA='0'), False),
        ({}, False),
    ):
        assert set_up(project, NEEDS_INSTALL, **environment).returncode == 0
        assert (setting in (project / 'arguments').read_text()) == has_setting


def test_one_version_of_ruff():
    locked = re.search(r'^name = "ruff"\nversion = "(.*)"', read('uv.lock'), re.M).group(1)
    assert set(re.findall(r'ruff==([\d.]+)', read('.pre-commit-config.yaml'))) == {locked}


def test_one_oldest_uv():
    oldest = re.search(r'oldest=(\S+)', read('tools/uv.sh')).group(1)
    assert f'required-version = ">={oldest}"' in read('pyproject.toml')


def read(name):
    return (ROOT / name).read_text()


def test_wheel_ships_package_configs_and_tools(tmp_path):
    ignore = shutil.ignore_patterns('__pycache__')
    for name in ('mmbiformer', *MIM_PARTS, 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        copy = shutil.copy if (ROOT / name).is_file() else shutil.copytree
        copy(ROOT / name, tmp_path / name, **({} if copy is shutil.copy else dict(ignore=ignore)))
    stale = tmp_path / 'build' / 'lib' / 'mmbiformer' / 'removed.py'
    stale.parent.mkdir(parents=True)
    stale.touch()
    (tmp_path / 'configs' / 'mine').mkdir()
    for own in ('mine.py', 'mine/another.py'):
        (tmp_path / 'configs' / own).touch()
    command = [sys.executable, 'setup.py', '--quiet', 'bdist_wheel']
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    with zipfile.ZipFile(next(tmp_path.glob('dist/mmbiformer-*.whl'))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith('METADATA'))).decode()
    package = files(tmp_path, 'mmbiformer')
    parts = [*SHIPPED, *(f'configs/{name}.py' for name in ENTRIES)]
    shipped = {f'mmbiformer/.mim/{name}' for part in parts for name in files(tmp_path, part)}
    hidden = {f'mmbiformer/.mim/tools/{name}' for name in DEVELOPER_TOOLS}
    assert {name for name in names if '.dist-info/' not in name} == package | shipped - hidden
    assert any(name.endswith('.cpp') for name in package)
    assert f'\nVersion: {mmbiformer.__version__}\n' in metadata
    assert set(re.findall('Provides-Extra: (.*)', metadata)) == {
        'onedl',
        'openmmlab',
        'export',
        'robustness',
    }


def files(root, part):
    """The files of a folder (or the file itself), relative to `root`."""
    paths = [root / part, *(root / part).rglob('*')]
    return {str(path.relative_to(root)) for path in paths if path.is_file()}
