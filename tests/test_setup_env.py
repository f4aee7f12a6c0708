"""Set-up of the environment (tools/setup_env.py) and packaging: no network, nothing compiled."""

import ast
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / 'requirements'
PYTHON = '{}.{}'.format(*sys.version_info[:2])


@pytest.fixture
def project(tmp_path):
    """A copy of what set-up needs of this project."""
    project = tmp_path / 'project'
    for name in ('tools/setup_env.py', 'setup.py', 'mmbiformer/__init__.py'):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    shutil.copytree(REQUIREMENTS, project / 'requirements')
    return project


@pytest.fixture
def setup_env(project, monkeypatch):
    """The script of that copy, as a module."""
    for name in ('FORCE_CUDA', 'MAX_JOBS', 'CXX'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('MMBIFORMER_CACHE', str(project / 'cache'))
    spec = importlib.util.spec_from_file_location('setup_env', project / 'tools' / 'setup_env.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(project, *args, code='pass', python=sys.executable, **environment):
    """Start the script; `code` changes its constants beforehand."""
    run = f'import sys, setup_env; {code}; sys.exit(setup_env.main())'
    return subprocess.Popen(
        [python, '-B', '-c', run, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            'PATH': '/nowhere',
            'HOME': str(project.parent / 'home'),
            'PYTHONPATH': str(project / 'tools'),
            **environment,
        },
    )


def stops_with(message, process):
    """Whether the script ends with one message that holds `message`, and with no traceback."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, (out, err)
    assert err.startswith('\nset-up stopped: ')
    assert 'Traceback' not in out + err
    return message in err


def files_of(folder):
    return sorted(path for path in folder.rglob('*') if '__pycache__' not in path.parts)


def make_complete(setup_env, venv, version=PYTHON):
    """Make what looks like a complete and current environment."""
    (venv / 'bin').mkdir(parents=True)
    (venv / 'bin' / 'python').symlink_to(sys.executable)
    (venv / 'pyvenv.cfg').write_text(f'home = /usr/bin\nversion = {version}.1\n')
    setup_env.write_stamp(venv, setup_env.fingerprint(venv), 'cpu')


# What stops it before anything is written


def test_missing_compiler(project):
    before = files_of(project.parent)
    assert stops_with('apt install g++', start(project))
    assert files_of(project.parent) == before


def test_compiler_that_does_not_work(project):
    before = files_of(project.parent)
    assert stops_with('(tried: /bin/false)', start(project, CXX='/bin/false'))
    assert files_of(project.parent) == before


def test_unknown_cuda_toolkit(project):
    assert stops_with('nvcc is not on PATH', start(project, FORCE_CUDA='1'))


def test_wrong_python(project):
    before = files_of(project.parent)
    code = 'setup_env.MAX_PYTHON = (3, 9)'
    process = start(project, '--only-this-python', code=code)
    assert stops_with(f'found Python {PYTHON} ({sys.executable}), but Python 3.10', process)
    assert files_of(project.parent) == before


def test_an_old_python_can_read_the_script():
    """It must get as far as saying that it is too old."""
    source = (ROOT / 'tools' / 'setup_env.py').read_text()
    ast.parse(source, feature_version=(3, 8))


def test_wrong_python_carries_on_in_one_that_runs(project, tmp_path):
    shim, works = tmp_path / 'bin' / 'python3.12', tmp_path / 'bin' / 'python3.11'
    shim.parent.mkdir()
    shim.write_text('#!/bin/sh\nexit 127\n')
    works.write_text('#!/bin/sh\necho "carried on with $*"\n')
    for path in (shim, works):
        path.chmod(0o755)
    code = 'sys.version_info = (3, 9, 1)'
    out, _ = start(project, 'openmmlab', code=code, PATH=str(tmp_path / 'bin')).communicate()
    assert f'will not do, using {works.name}' in out
    assert re.search('carried on with .* openmmlab', out)


def test_missing_venv_module(project):
    hide = 'import importlib.util as u; find = u.find_spec; '
    hide += 'u.find_spec = lambda name: None if name == "ensurepip" else find(name)'
    assert stops_with(f'apt install python{PYTHON}-venv', start(project, code=hide))


def test_missing_python_headers(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env.sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(setup_env.SetupError, match=rf'apt install python{PYTHON}-dev'):
        setup_env.check_python_headers()


def test_too_little_disk(setup_env, tmp_path):
    usage = namedtuple('usage', 'free')
    needs = [(tmp_path / 'a' / 'venv', 9), (tmp_path / 'b' / 'cache', 3)]  # on one disk
    setup_env.check_disk(needs, usage=lambda path: usage(12.1e9))
    with pytest.raises(setup_env.SetupError, match=r'11\.9 GB are free .* 12 GB are needed'):
        setup_env.check_disk(needs, usage=lambda path: usage(11.9e9))


def test_requirement_that_the_lock_lacks(project):
    with (project / 'requirements' / 'dev.txt').open('a') as file:
        file.write('coverage==7.0\n')
    before = files_of(project.parent)
    assert stops_with('lock-onedl.txt does not hold the coverage==7.0', start(project))
    assert files_of(project.parent) == before


# What is there already


def test_nothing_to_do(project, setup_env):
    make_complete(setup_env, project / '.venv')
    process = start(project)
    assert process.communicate() == ('', '')
    assert process.returncode == 0


@pytest.mark.parametrize('name', ['requirements/onedl.txt', 'tools/setup_env.py', 'setup.py'])
def test_changed_needs(project, setup_env, name):
    venv = project / '.venv'
    make_complete(setup_env, venv)
    assert setup_env.is_up_to_date(venv, False)
    with (project / name).open('a') as file:
        file.write('# changed\n')
    assert not setup_env.is_up_to_date(venv, False)


def test_removed_interpreter(project, setup_env):
    make_complete(setup_env, project / '.venv')
    (project / '.venv' / 'bin' / 'python').unlink()
    assert not setup_env.is_up_to_date(project / '.venv', False)


def test_cuda_is_asked_for(project, setup_env, monkeypatch):
    make_complete(setup_env, project / '.venv')
    monkeypatch.setenv('FORCE_CUDA', '0')
    assert setup_env.is_up_to_date(project / '.venv', False)
    monkeypatch.setenv('FORCE_CUDA', '1')
    assert not setup_env.is_up_to_date(project / '.venv', False)


def test_environment_of_another_python(project, setup_env):
    make_complete(setup_env, project / '.venv', version='3.1')
    assert setup_env.is_up_to_date(project / '.venv', False)
    assert stops_with('.venv was made with Python 3.1', start(project, '--only-this-python'))


def test_environment_of_someone_else_is_left_alone(project):
    (project / '.venv').mkdir()
    (project / '.venv' / 'pyvenv.cfg').write_text('')
    before = files_of(project)
    assert stops_with('did not make it', start(project))
    assert files_of(project) == before


def test_wheel_cache_key(project, setup_env, monkeypatch):
    first = setup_env.wheel_folder('onedl', 'cpu')
    assert first.parent == project / 'cache' / 'wheels'
    assert first.name.startswith('cp{}{}-'.format(*sys.version_info[:2]))
    assert setup_env.wheel_folder('onedl', 'cpu') == first
    others = {setup_env.wheel_folder('openmmlab', 'cpu')}
    for name, pin in (('torch', 'torch'), ('onedl', 'onedl-mmcv')):
        file = project / 'requirements' / f'{name}.txt'
        text = file.read_text()
        file.write_text(re.sub(f'^{pin}==.*', f'{pin}==99', text, flags=re.M))
        others.add(setup_env.wheel_folder('onedl', 'cpu'))
        file.write_text(text)
    monkeypatch.setattr(setup_env.shutil, 'which', lambda name: name)
    for arch in ('8.0', '9.0+PTX'):
        monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', arch)
        others.add(setup_env.wheel_folder('onedl', 'cuda'))
    assert len({first, *others}) == 6


# What goes wrong on the way


def test_no_package_index(project, setup_env):
    """Nor is a compiler asked for where the wheel is there already."""
    wheel = setup_env.wheel_folder('onedl', 'cpu') / 'mmcv.whl'
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    before = files_of(project)
    process = start(
        project,
        code='setup_env.VENV_GB = setup_env.TEMP_GB = setup_env.CACHE_GB = 0',
        MMBIFORMER_CACHE=str(project / 'cache'),
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL='http://127.0.0.1:9',
        PIP_RETRIES='0',
    )
    assert stops_with('The package index could not be reached', process)
    assert files_of(project) == sorted([*before, project / '.venv.log'])


def write_wheel(folder, name):
    """Write an empty package of version 1.0; return its line of a lock file."""
    wheel = folder / f'{name}-1.0-py3-none-any.whl'
    parts = {
        'METADATA': f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n',
        'WHEEL': 'Wheel-Version: 1.0\nTag: py3-none-any\n',
        'RECORD': '',
    }
    with zipfile.ZipFile(wheel, 'w') as file:
        for part, text in parts.items():
            file.writestr(f'{name}-1.0.dist-info/{part}', text)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f'{name.replace("_", "-")}==1.0 --hash=sha256:{digest}\n'


@pytest.mark.parametrize('tampered', [False, True])
def test_files_are_checked_against_the_lock(project, setup_env, tampered):
    index, requirements = project / 'index', project / 'requirements'
    index.mkdir()
    lock = write_wheel(index, 'torch') + write_wheel(index, 'opencv_python_headless')
    (requirements / 'lock-onedl.txt').write_text(f'{lock}onedl-mmcv==1.0 --hash=sha256:0\n')
    for name in ('build', 'torch', 'onedl', 'dev', 'constraints'):
        pin = 'onedl-mmcv==1.0\n' if name == 'onedl' else 'torch==1.0\n'
        (requirements / f'{name}.txt').write_text(pin)
    if tampered:
        with zipfile.ZipFile(index / 'torch-1.0-py3-none-any.whl', 'a') as file:
            file.writestr('torch.py', 'import evil')
    built = setup_env.wheel_folder('onedl', 'cpu') / 'onedl_mmcv-1.0-py3-none-any.whl'
    built.parent.mkdir(parents=True)
    built.touch()  # where set-up stops if nothing else stops it
    before = files_of(project)
    process = start(
        project,
        code='setup_env.VENV_GB = setup_env.TEMP_GB = setup_env.CACHE_GB = 0',
        MMBIFORMER_CACHE=str(project / 'cache'),
        PIP_CONFIG_FILE=os.devnull,
        PIP_NO_INDEX='1',
        PIP_FIND_LINKS=str(index),
    )
    message = 'is not the one that requirements/lock-*.txt names' if tampered else 'step 3 ('
    assert stops_with(message, process)
    assert files_of(project) == sorted([*before, project / '.venv.log'])


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted(project, setup_env, number):
    venv = project / '.venv'
    venv.mkdir()
    setup_env.write_stamp(venv, setup_env.UNFINISHED, 'cpu')  # an earlier one was killed
    code = 'setup_env.VENV_GB = setup_env.TEMP_GB = setup_env.CACHE_GB = 0; '
    code += 'setup_env.find_compiler = setup_env.check_python_headers = lambda: None; '
    # Shells let what they start in the background ignore Ctrl-C, these tests for instance.
    code += 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)'
    process = start(project, code=code)
    assert process.stdout.readline() == 'removing .venv, which is incomplete\n'
    assert process.stdout.readline().startswith('[1/4] ')
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip().startswith('set-up interrupted') and 'Traceback' not in err
    assert not [path for path in project.glob('.venv*') if path.is_dir()]


def test_failing_command_shows_the_end_of_its_output(setup_env, tmp_path):
    runner = setup_env.Runner(tmp_path / 'log')
    runner.step('testing')
    code = 'print(*range(100), sep="\\n"); print("Killed"); exit(3)'
    with pytest.raises(setup_env.SetupError) as error:
        runner.run([sys.executable, '-c', code])
    lines = str(error.value).splitlines()
    assert lines[0] == 'step 1 (testing) failed with exit status 3:'
    assert lines[1:7] == ['  | 95', '  | 96', '  | 97', '  | 98', '  | 99', '  | Killed']
    assert 'MAX_JOBS=1' in lines[7]
    assert lines[8] == f'Full log: {tmp_path / "log"}'
    assert (tmp_path / 'log').read_text().splitlines()[2:102] == [str(i) for i in range(100)]


def test_one_set_up_at_a_time(project, setup_env):
    log = setup_env.log_file(project / '.venv')
    code = 'setup_env.VENV_GB = setup_env.TEMP_GB = setup_env.CACHE_GB = 0; '
    code += 'setup_env.find_compiler = setup_env.check_python_headers = lambda: None'
    with log.open('ab') as file:
        setup_env.wait_for_lock(file)
        process = start(project, code=code)
        assert process.stdout.readline().startswith('waiting for another set-up')
        make_complete(setup_env, project / '.venv')
    assert process.communicate(timeout=30) == ('', '')
    assert process.returncode == 0


@pytest.mark.parametrize(
    ('line', 'gist'),
    [
        ('  [12/77] c++ -MMD -MF /a/b.o.d -c b.cpp', 'compiled 12 of 77 files'),
        ('  Downloading torch-2.11.0-cp311-cp311-linux.whl (9 MB)', 'downloading torch-2.11.0'),
        ('  Downloading http://host/a/b_c-1.0-py3-none-any.whl.metadata (9 kB)', None),
        ('Installing collected packages: mpmath, torch', 'unpacking'),
        ('  copying mmcv/version.py', None),
    ],
)
def test_summary(setup_env, line, gist):
    assert setup_env.summary(line) == gist


def test_compile_jobs(setup_env, monkeypatch):
    pages = {'SC_PAGE_SIZE': 4096, 'SC_PHYS_PAGES': int(3.2e9 / 4096)}
    monkeypatch.setattr(setup_env.os, 'sysconf', pages.get)
    monkeypatch.setattr(setup_env.os, 'sched_getaffinity', lambda pid: range(64), raising=False)
    assert setup_env.compile_jobs() == '2'
    pages['SC_PHYS_PAGES'] = 1
    assert setup_env.compile_jobs() == '1'


# Files that have to agree


def test_requirements_are_pinned():
    for path in set(REQUIREMENTS.glob('*.txt')) - set(REQUIREMENTS.glob('lock-*.txt')):
        lines = [line for line in path.read_text().splitlines() if not line.startswith('#')]
        if path.name == 'openmmlab.txt':
            lines = [line for line in lines if line not in ('ftfy', 'regex')]  # constraints.txt
        assert all(re.fullmatch(r'[a-z0-9-]+==[\w.]+', line) for line in lines), path


@pytest.mark.parametrize('stack', ['onedl', 'openmmlab'])
def test_lock(setup_env, stack):
    """Every line is a version with SHA-256 hashes, and the same as the other files pin."""
    setup_env.check_lock(stack)
    text = (REQUIREMENTS / f'lock-{stack}.txt').read_text()
    assert '://' not in text and '@' not in text  # neither an index nor a local file
    entries = re.sub(r'^ *#.*\n', '', text, flags=re.M).replace('\\\n', '').splitlines()
    pin = r'[a-z0-9-]+(\[[a-z, ]+\])?==[\w.]+( ; [^-]+)?'
    assert len(entries) > 90
    assert 'opencv-python-headless==' in text  # set-up installs it by its name
    assert all(re.fullmatch(rf'{pin}( +--hash=sha256:[0-9a-f]{{64}})+', e.strip()) for e in entries)


def test_one_version_of_ruff():
    pin = re.search(r'^ruff==.*', (REQUIREMENTS / 'dev.txt').read_text(), re.M).group()
    hooks = (ROOT / '.pre-commit-config.yaml').read_text()
    assert set(re.findall(r'ruff==[\d.]+', hooks)) == {pin}


def test_wheel_ships_configs_tools_and_sources(project, tmp_path):
    sources = Path('mmbiformer/ops/backends/cpp')
    (project / sources).mkdir(parents=True)
    packages = [f'{folder}/__init__.py' for folder in [sources, *sources.parents][:3]]
    for file in (*packages, sources / 'attention.cpp'):
        (project / file).touch()
    (project / 'configs' / '_base_').mkdir(parents=True)
    (project / 'configs' / '_base_' / 'a.py').touch()
    (project / 'tools' / 'train.py').touch()
    (project / 'model-index.yml').touch()
    shutil.copy(ROOT / 'pyproject.toml', project)
    stale = project / 'build' / 'lib' / 'mmbiformer' / 'removed.py'
    stale.parent.mkdir(parents=True)
    stale.touch()
    command = [sys.executable, 'setup.py', '--quiet', 'bdist_wheel', '--dist-dir', str(tmp_path)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob('mmbiformer-*.whl'))) as wheel:
        names = {name for name in wheel.namelist() if '.dist-info/' not in name}
    shipped = ('configs/_base_/a.py', 'tools/train.py', 'model-index.yml')
    package = 'mmbiformer/__init__.py', *packages, str(sources / 'attention.cpp')
    assert names == {*package, *(f'mmbiformer/.mim/{name}' for name in shipped)}
    assert not (project / 'mmbiformer' / '.mim').exists()
