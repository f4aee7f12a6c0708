"""The demo reaches its bar with scenes of another seed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_demo_learns_other_scenes(tmp_path):
    """In a copy of the project, so that the data and pictures of `make demo` stay as they are."""
    for folder in ('configs', 'tools'):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', str(tmp_path / 'tools' / 'demo.py'), '--seed', '1'],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    print(done.stdout[-3000:])
    found = re.search(r'mask AP (\S+), box AP (\S+)', done.stdout)
    assert float(found[1]) >= 0.50
    for name in ('curves.png', 'predictions.png'):
        assert (tmp_path / 'work_dirs' / 'demo' / 'maskrcnn' / name).stat().st_size > 10_000
