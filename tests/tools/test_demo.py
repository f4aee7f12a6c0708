"""What the demo says at its end; tests/integration/test_demo.py runs it."""

import os
import re
import runpy
import subprocess
import sys

import pytest

from tests.helpers.configs import ROOT


@pytest.fixture(scope='module')
def ending():
    demo = runpy.run_path(str(ROOT / 'tools' / 'demo.py'), run_name='tool')
    return demo['next_steps']('python tools/test.py CONFIG CHECKPOINT --show-dir shown')


def test_commands_work_in_a_fresh_shell(ending):
    """Where the shell begins does not matter, and nothing has to be active."""
    lines = [line.strip() for line in ending.splitlines() if line.startswith('  ')]
    *begin, test = lines[: len(lines) - 2]
    assert test == 'python tools/test.py CONFIG CHECKPOINT --show-dir shown'
    if sys.prefix == sys.base_prefix:  # nothing to activate
        begin.append(f'PATH={os.path.dirname(sys.executable)}:$PATH')
    show = 'pwd; python -c "import sys; print(sys.prefix)"'
    script = '\n'.join(['set -e', *begin, show])
    done = subprocess.run(
        ['env', '-i', f'PATH={os.defpath}', 'bash', '-c', script],
        cwd='/',
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split()) == (0, [str(ROOT), sys.prefix]), done.stderr


def test_names_files_that_exist(ending):
    for path in re.findall(r'(?:tools|docs)/\S+\.(?:py|md)', ending):
        assert (ROOT / path).is_file(), path
