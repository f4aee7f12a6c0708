#!/usr/bin/env python3
"""Make the virtual environment that the `make` targets run in.

    python3 tools/setup_env.py              # .venv: the OneDL forks
    python3 tools/setup_env.py openmmlab    # .venv-openmmlab: the OpenMMLab originals

Where there is nothing to do it returns at once. Every file that pip fetches is checked against the
hashes in `requirements/lock-*.txt`, which `make lock` renews. mmcv's C++ operators are compiled
once per machine (8 to 15 minutes on two cores); the wheel is kept in `~/.cache/mmbiformer` for
later set-ups.

Environment variables:
    MMBIFORMER_CACHE  where built wheels are kept, instead of `~/.cache/mmbiformer`
    CXX               the C++ compiler
    MAX_JOBS          compile jobs at a time, instead of what cores and memory allow
    FORCE_CUDA        1: compile mmcv's CUDA operators too (needs nvcc); 0: the CPU ones only

This file needs nothing but the standard library and keeps to the syntax of Python 3.8, so that it
can tell the user of a wrong Python what is missing.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / 'requirements'
VENVS = {'onedl': ROOT / '.venv', 'openmmlab': ROOT / '.venv-openmmlab'}
MIN_PYTHON, MAX_PYTHON = (3, 10), (3, 12)
PYTHON_VERSION = '{}.{}'.format(*sys.version_info[:2])

# Gigabytes at the peak: the environment; pip's temporary files in it (downloads, the mmcv build);
# pip's own cache and the mmcv wheel in the user's cache folder.
VENV_GB, TEMP_GB, CACHE_GB = 6, 2, 2
# The memory that one compiler process takes at most, rounded up.
GB_PER_JOB = 1.5

STEPS = 4
UNFINISHED = 'unfinished'
IMPORT_CHECK = 'import cv2, mmcv.ops, mmengine, mmdet, mmseg, mmpretrain, mmbiformer'


class SetupError(Exception):
    """A reason to stop: what was found, what is needed, what to do."""


# What is there already


def fingerprint(venv):
    """Hash everything that decides what an environment holds."""
    digest = hashlib.sha256(str(venv).encode())  # an environment does not survive being moved
    for path in [*sorted(REQUIREMENTS.glob('*.txt')), ROOT / 'setup.py', Path(__file__).resolve()]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp(venv):
    """Return what set-up left: (fingerprint or 'unfinished', 'cpu' or 'cuda'), else Nones."""
    try:
        state, ops = (venv / 'mmbiformer-setup').read_text().split()
    except (OSError, ValueError):
        return None, None
    return state, ops


def write_stamp(venv, state, ops):
    (venv / 'mmbiformer-setup').write_text(f'{state} {ops}\n')


def log_file(venv):
    return venv.with_name(venv.name + '.log')


def venv_python(venv):
    return venv / 'bin' / 'python'


def is_complete(venv):
    """Whether a set-up, maybe of an older state, ran to its end here."""
    return read_stamp(venv)[0] not in (None, UNFINISHED) and venv_python(venv).exists()


def wanted_ops(venv):
    """FORCE_CUDA decides; where it is not set, an environment keeps the operators that it has."""
    if 'FORCE_CUDA' in os.environ:
        return 'cuda' if os.environ['FORCE_CUDA'] == '1' else 'cpu'
    return read_stamp(venv)[1] or 'cpu'


def is_up_to_date(venv, only_this_python):
    """Whether there is nothing to do; raise if the environment is one that must not be changed."""
    state, ops = read_stamp(venv)
    if state is None and venv.exists() and any(venv.iterdir()):
        raise SetupError(
            f'{venv.name} exists, but this script did not make it and will not touch it.\n'
            f'Move it away or remove it: rm -r {venv.name}'
        )
    if not is_complete(venv):
        return False
    config = (venv / 'pyvenv.cfg').read_text()
    version = re.search(r'^version = (\d+\.\d+)', config, re.MULTILINE).group(1)
    if only_this_python and version != PYTHON_VERSION:
        raise SetupError(
            f'{venv.name} was made with Python {version}, asked for is {PYTHON_VERSION} '
            f'({sys.executable}).\nTo make it anew, remove it first: rm -r {venv.name}'
        )
    return (state, ops) == (fingerprint(venv), wanted_ops(venv))


# What the machine offers


def succeeds(command, **options):
    return subprocess.run(command, capture_output=True, **options).returncode == 0


def choose_python(only_this_python):
    """Return if this interpreter will do, else carry on in one that will."""
    if MIN_PYTHON <= sys.version_info[:2] <= MAX_PYTHON:
        return
    found = f'Python {PYTHON_VERSION} ({sys.executable})'
    names = [f'python3.{minor}' for minor in range(MAX_PYTHON[1], MIN_PYTHON[1] - 1, -1)]
    for name in [] if only_this_python else names:
        # Being on PATH is not enough: a version manager's shim may refuse to run.
        if shutil.which(name) and succeeds([name, '--version']):
            print(f'{found} will not do, using {name}', flush=True)
            os.execvp(name, [name, *sys.argv])
    raise SetupError(
        f'found {found}, but Python 3.10, 3.11 or 3.12 is needed.\n'
        'Install one of them, or say where it is: make env PYTHON=/path/to/python3.11'
    )


def check_venv_module():
    for module in ('venv', 'ensurepip'):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f'Python {PYTHON_VERSION} ({sys.executable}) cannot make virtual environments: '
                f'its module {module} is missing.\n'
                f'Install it, e.g. with: apt install python{PYTHON_VERSION}-venv'
            )


def find_compiler():
    """Return the command of a C++17 compiler that works."""
    names = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    for name in names:
        command = shlex.split(name)
        if shutil.which(command[0]):
            test = [*command, '-std=c++17', '-fsyntax-only', '-x', 'c++', '-']
            if succeeds(test, input=b'#include <vector>\nint main() {}\n'):
                return name
    raise SetupError(
        f'no working C++17 compiler found (tried: {", ".join(names)}), '
        'and mmcv has to be compiled once.\n'
        'Install one, e.g. with: apt install g++\n'
        'or say where it is: make env CXX=/path/to/compiler'
    )


def check_python_headers():
    if not Path(sysconfig.get_path('include'), 'Python.h').exists():
        raise SetupError(
            f'the headers of Python {PYTHON_VERSION} ({sys.executable}) are missing, '
            'and mmcv has to be compiled once.\n'
            f'Install them, e.g. with: apt install python{PYTHON_VERSION}-dev'
        )


def cuda_architectures():
    """Return what to compile CUDA operators for, as torch writes it: '9.0' or '8.0;9.0'."""
    if shutil.which('nvcc') is None:
        raise SetupError(
            'FORCE_CUDA=1 is set, but nvcc is not on PATH.\n'
            "Install the CUDA toolkit of torch's CUDA version, or set FORCE_CUDA=0."
        )
    if os.environ.get('TORCH_CUDA_ARCH_LIST'):
        return os.environ['TORCH_CUDA_ARCH_LIST']
    query = ['nvidia-smi', '--query-gpu=compute_cap', '--format=csv,noheader']
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return ';'.join(sorted(set(subprocess.check_output(query, text=True).split())))
    raise SetupError(
        'FORCE_CUDA=1 is set, but nvidia-smi finds no GPU.\n'
        'Say what to compile for, e.g. TORCH_CUDA_ARCH_LIST=9.0'
    )


def check_disk(needs, usage=shutil.disk_usage):
    """Raise if a file system is too full for `needs`, a list of (path, gigabytes)."""
    per_device = {}
    for path, gigabytes in needs:
        while not path.exists():
            path = path.parent
        device = path.stat().st_dev
        first, total = per_device.get(device, (path, 0))
        per_device[device] = (first, total + gigabytes)
    for path, gigabytes in per_device.values():
        free = usage(path).free / 1e9
        if free < gigabytes:
            raise SetupError(
                f'too little disk space: {free:.1f} GB are free on the disk of {path}, '
                f'{gigabytes} GB are needed.\nFree some space and run this again.'
            )


def compile_jobs():
    """Return as many jobs as there are cores, fewer where memory is short."""
    if os.environ.get('MAX_JOBS'):
        return os.environ['MAX_JOBS']
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    with contextlib.suppress(OSError, ValueError):  # a container's limit, or 'max'
        memory = min(memory, int(Path('/sys/fs/cgroup/memory.max').read_text()))
    return str(max(1, min(cores, int(memory / 1e9 / GB_PER_JOB))))


# The cache of mmcv wheels


def cache_folder():
    if os.environ.get('MMBIFORMER_CACHE'):
        return Path(os.environ['MMBIFORMER_CACHE']).expanduser().resolve()
    return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'mmbiformer'


def pinned(filename, name):
    """Return the (name, version) that a requirement file pins; `name` is a regular expression."""
    text = (REQUIREMENTS / filename).read_text()
    return re.search(rf'^({name})==(\S+)', text, re.MULTILINE).groups()


def pinned_mmcv(stack):
    return pinned(f'{stack}.txt', '(?:onedl-)?mmcv')


def locked(stack):
    """Return what a stack's lock file holds: {name: its lines, with versions and hashes}."""
    text = (REQUIREMENTS / f'lock-{stack}.txt').read_text()
    entries = {}
    for entry in re.split(r'^(?=\w)', text, flags=re.MULTILINE)[1:]:
        name = re.match(r'[\w.-]+', entry).group()
        # One name may have several: another version for another Python.
        entries[name] = entries.get(name, '') + entry
    return entries


def check_lock(stack):
    """Raise if a stack's lock file contradicts the files that it was made from."""
    entries = locked(stack)
    for file in ('build', 'torch', stack, 'dev', 'constraints'):
        text = (REQUIREMENTS / f'{file}.txt').read_text()
        for name, pin in re.findall(r'^([\w.-]+)(==\S+|)', text, re.MULTILINE):
            if file == 'constraints' and name not in entries:
                continue  # of the other stack
            if f'{pin} ' not in entries.get(name, ''):
                raise SetupError(
                    f'requirements/lock-{stack}.txt does not hold the {name}{pin} '
                    f'of requirements/{file}.txt.\nRenew it: make lock'
                )


def wheel_folder(stack, ops):
    """Where the wheel for this Python, machine, torch, mmcv and kind of operators is kept."""
    python = 'cp{}{}'.format(*sys.version_info[:2])
    torch, mmcv = ''.join(pinned('torch.txt', 'torch')), ''.join(pinned_mmcv(stack))
    if ops == 'cuda':
        ops += re.sub(r'\W+', '_', cuda_architectures())
    key = f'{python}-{sysconfig.get_platform()}-{torch}-{mmcv}-{ops}'
    return cache_folder() / 'wheels' / key


def wheel_in(folder):
    return next(folder.glob('*.whl'), None)


# Doing it


class Runner:
    """Runs the commands of each step: their output goes to a log file, its gist to the terminal."""

    def __init__(self, log):
        self.log = log
        self.steps = 0
        self.title = ''

    def step(self, title):
        self.steps += 1
        self.title = title
        print(f'[{self.steps}/{STEPS}] {title}', flush=True)

    def run(self, command, **environment):
        """Run a command to its end; raise a SetupError that shows the last of its output."""
        command = [str(part) for part in command]
        with self.log.open('ab+') as log:
            log.write(f'\n$ {" ".join(command)}\n'.encode())
            start = log.tell()
            process = None
            try:
                with interrupts_held():
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        cwd=str(ROOT),
                        env=dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK='1', **environment),
                        # Ctrl-C reaches this script only, which ends them all.
                        start_new_session=True,
                    )
                follow(process.stdout, log)
                process.wait()
            except BaseException:
                if process is not None:
                    end(process)
                raise
            process.stdout.close()
            if process.returncode != 0:
                log.seek(start)
                output = log.read().decode(errors='replace')
                raise SetupError(self.explain(process.returncode, output))

    def explain(self, status, output):
        lines = [f'step {self.steps} ({self.title}) failed with exit status {status}:']
        lines += [f'  | {line[:200]}' for line in output.splitlines() if line.strip()][-6:]
        if 'No space left on device' in output:
            lines.append('The disk is full: free some space and run this again.')
        elif 'DO NOT MATCH THE HASHES' in output:
            lines.append('A downloaded file is not the one that requirements/lock-*.txt names.')
            lines.append('Do not trust this package index: find out why, or use another one.')
        elif re.search('No matching distribution|ConnectionError|Could not fetch URL', output):
            lines.append('The package index could not be reached, or lacks this package.')
            lines.append('Check the network and the settings of pip (pip config list).')
        elif 'Killed' in output:
            lines.append('The compiler was killed, most likely for memory: try MAX_JOBS=1.')
        return '\n'.join([*lines, f'Full log: {self.log}'])


@contextlib.contextmanager
def interrupts_held():
    """Let Ctrl-C and SIGTERM wait: a command that is just starting could not be ended."""
    held = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda *args: held.append(args)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


def end(process):
    """End a command together with everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        # ninja runs each compiler in a process group of its own, so let it pass the signal on.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


def follow(stream, log):
    """Copy a command's output to the log and show how far it is."""
    live = sys.stdout.isatty()
    started = shown = time.monotonic()
    gist, rest, width = '', b'', 0
    while True:
        if select.select([stream], [], [], 1.0)[0]:
            data = os.read(stream.fileno(), 65536)
            if not data:
                break
            log.write(data)
            log.flush()
            *lines, rest = (rest + data).split(b'\n')
            for line in lines:
                gist = summary(line.decode(errors='replace')) or gist
        now = time.monotonic()
        if now - shown >= (0.5 if live else 20):
            shown = now
            minutes, seconds = divmod(int(now - started), 60)
            text = f'      {minutes}:{seconds:02d} {gist}'[:79]
            if live:  # one line that is rewritten
                print(f'\r{text.ljust(width)}', end='', flush=True)
                width = len(text)
            else:
                print(text, flush=True)
    if width:
        print(f'\r{" " * width}\r', end='', flush=True)


def summary(line):
    """Return what a line of pip's or ninja's output says about the progress, or None."""
    match = re.match(r'\s*\[(\d+)/(\d+)\] ', line)
    if match:
        return 'compiled {} of {} files'.format(*match.groups())
    match = re.match(r'\s*Downloading (?:\S*/)?([^-/]+-[^-]+)-\S+\.whl( |$)', line)
    if match:
        return f'downloading {match.group(1)}'
    if line.startswith('Installing collected packages'):
        return 'unpacking'
    return None


def only(entries, names, folder):
    """Write a lock file of these names only; return the options that make pip install it."""
    path = Path(tempfile.mkdtemp(dir=str(folder)), 'lock.txt')
    path.write_text(''.join(entries[name] for name in names))
    # The lock is complete, so there are no dependencies to resolve.
    return ['--require-hashes', '--no-deps', '-r', path]


def build_mmcv(runner, venv, stack, ops, folder, compiler):
    """Compile mmcv against the environment's torch; the wheel gets into the cache whole or not."""
    name, _ = pinned_mmcv(stack)
    environment = {
        'MMCV_WITH_OPS': '1',
        'MAX_JOBS': compile_jobs(),
        'CXX': compiler,
        # Python's own flags ask for a debugger's symbols, which take half of the time.
        'CFLAGS': f'-g0 {os.environ.get("CFLAGS", "")}'.strip(),
        'PATH': f'{venv / "bin"}{os.pathsep}{os.environ["PATH"]}',  # torch looks for ninja there
    }
    if ops == 'cuda':
        environment.update(FORCE_CUDA='1', TORCH_CUDA_ARCH_LIST=cuda_architectures())
    else:
        # mmcv compiles for CUDA whenever it sees a GPU, whatever FORCE_CUDA says.
        environment.update(FORCE_CUDA='0', CUDA_VISIBLE_DEVICES='')
    # pip's own cache does not know which torch a wheel was compiled against: keep out of it.
    options = ['-v', '--no-build-isolation', '--no-cache-dir', '--no-binary', name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.building-', dir=str(folder.parent)) as temporary:
        built = Path(temporary, 'wheel')
        command = [venv_python(venv), '-m', 'pip', 'wheel', *options, '-w', built]
        runner.run([*command, *only(locked(stack), [name], temporary)], **environment)
        with zipfile.ZipFile(str(wheel_in(built))) as wheel:
            if not any(entry.startswith('mmcv/_ext.') for entry in wheel.namelist()):
                raise SetupError(f'mmcv came out without its operators.\nFull log: {runner.log}')
        if wheel_in(folder) is None:  # unless another set-up was faster
            built.rename(folder)


def install(venv, stack, ops, folder, compiler):
    """Carry out the steps, on an empty folder or a complete environment of an older state."""
    runner = Runner(log_file(venv))
    pip = [venv_python(venv), '-m', 'pip']
    # Without build isolation: what the libraries are built with is pinned as well. Without
    # compiling to bytecode what is mostly never imported, which would take a while.
    get = [*pip, 'install', '--no-build-isolation', '--no-compile']
    entries = locked(stack)
    mmcv, mmcv_version = pinned_mmcv(stack)
    build = re.findall(r'^[\w.-]+', (REQUIREMENTS / 'build.txt').read_text(), re.MULTILINE)

    runner.step(f'making {venv.name} with Python {PYTHON_VERSION}')
    if not venv_python(venv).exists():
        runner.run([sys.executable, '-m', 'venv', venv])
    # pip unpacks gigabytes into its temporary folder, and /tmp is small on many machines.
    temporary = venv / 'tmp'
    temporary.mkdir(exist_ok=True)
    os.environ['TMPDIR'] = str(temporary)

    runner.step(f'installing torch, the {stack} libraries and the development tools')
    runner.run([*get, *only(entries, build, temporary)])
    runner.run([*get, *only(entries, [name for name in entries if name != mmcv], temporary)])
    # The libraries bring both builds of OpenCV, which share a folder: the one that does without
    # libGL has to be unpacked last.
    headless = only(entries, ['opencv-python-headless'], temporary)
    runner.run([*get, '--force-reinstall', *headless])

    title = f'{mmcv} {mmcv_version} ({ops.upper()} operators)'
    if wheel_in(folder) is None:
        runner.step(f'compiling {title}, once per machine; two cores take up to 10 minutes')
        if ops == 'cpu' and shutil.which('nvidia-smi'):
            print('      to train detectors on the GPU, set FORCE_CUDA=1', flush=True)
        build_mmcv(runner, venv, stack, ops, folder, compiler)
    else:
        runner.step(f'installing {title}, compiled before')
    runner.run([*pip, 'install', '--no-deps', '--force-reinstall', wheel_in(folder)])

    runner.step('installing mmbiformer (editable) and importing everything once')
    runner.run([*pip, 'install', '--no-deps', '--no-build-isolation', '-e', '.'])
    runner.run([venv_python(venv), '-W', 'ignore', '-c', IMPORT_CHECK])
    shutil.rmtree(str(temporary))


def remove(venv):
    """Remove an environment under another name: interrupted, it leaves none that looks whole."""
    trash = venv.with_name(venv.name + '.trash')
    shutil.rmtree(str(trash), ignore_errors=True)
    venv.rename(trash)
    shutil.rmtree(str(trash), ignore_errors=True)


def wait_for_lock(file):
    """Let one set-up at a time work on an environment."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print('waiting for another set-up of the same environment', flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)


def set_up(stack, only_this_python):
    """Bring the environment of a stack up to date."""
    venv = VENVS[stack]
    if is_up_to_date(venv, only_this_python):
        return
    choose_python(only_this_python)
    check_venv_module()
    check_lock(stack)
    ops = wanted_ops(venv)
    folder = wheel_folder(stack, ops)
    compiler = None
    if wheel_in(folder) is None:
        compiler = find_compiler()
        check_python_headers()
    venv_gb = TEMP_GB if is_complete(venv) else VENV_GB + TEMP_GB
    check_disk([(venv, venv_gb), (cache_folder(), CACHE_GB)])

    started = time.monotonic()
    with log_file(venv).open('ab') as log:
        wait_for_lock(log)
        if is_up_to_date(venv, only_this_python):
            return  # thanks to the set-up that was waited for
        log.truncate(0)
        old_stamp = read_stamp(venv) if is_complete(venv) else None
        new_state = fingerprint(venv)
        if venv.exists() and not old_stamp:
            print(f'removing {venv.name}, which is incomplete', flush=True)
            remove(venv)
        venv.mkdir(exist_ok=True)
        write_stamp(venv, UNFINISHED, ops)
        try:
            install(venv, stack, ops, folder, compiler)
        except SetupError:
            if old_stamp:  # out of date as before, so the next set-up updates it again
                write_stamp(venv, *old_stamp)
            else:
                remove(venv)
            raise
        except BaseException:
            remove(venv)
            raise
        write_stamp(venv, new_state, ops)
    print(f'{venv.name} is ready ({time.monotonic() - started:.0f} s)', flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('stack', nargs='?', default='onedl', choices=sorted(VENVS))
    parser.add_argument(
        '--only-this-python',
        action='store_true',
        help='use the Python that runs this script and no other',
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        set_up(args.stack, args.only_this_python)
    except (SetupError, OSError) as error:
        print(f'\nset-up stopped: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nset-up interrupted: nothing half-made is left, run it again', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
