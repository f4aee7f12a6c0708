"""Puts configs and tools into the wheel; everything else is in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# What OpenMMLab's `mim` looks for inside an installed package, in its folder `.mim`.
MIM_PARTS = ('configs', 'tools', 'model-index.yml')


def not_shipped(folder: str, names: list[str]) -> set[str]:
    """Leave out the set-up's scripts, and a user's own configs: those that no metafile lists."""
    hidden = {'__pycache__', 'setup_env.sh', 'uv.sh'}
    if Path(folder) == ROOT / 'configs':
        metafiles = [name for name in names if name.startswith('metafile_')]
        text = ''.join(Path(folder, name).read_text(encoding='utf-8') for name in metafiles)
        listed = re.findall(r'Config: configs/(\S+)', text)
        hidden |= {*names} - {'_base_', 'demo', *metafiles, *listed}
    return hidden


class BuildWithMim(build_py):
    """Copies configs and tools into the wheel, as OpenMMLab packages do.

    They go from the source tree straight into the build folder: no copy or link of them is ever
    left inside `mmbiformer/`. An editable install needs none.
    """

    def run(self):
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib, 'mmbiformer')
        # An earlier build may have left modules there that are gone by now.
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        mim = package / '.mim'
        mim.mkdir()
        for part in filter(Path.exists, map(ROOT.joinpath, MIM_PARTS)):
            if part.is_dir():
                shutil.copytree(part, mim / part.name, ignore=not_shipped)
            else:
                shutil.copy2(part, mim)


setup(cmdclass={'build_py': BuildWithMim})
