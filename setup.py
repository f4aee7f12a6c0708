"""Packaging; everything about tools (ruff, pytest) is in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# What OpenMMLab's `mim` looks for inside an installed package, in its folder `.mim`.
MIM_PARTS = ('configs', 'tools', 'model-index.yml')
NOT_SHIPPED = shutil.ignore_patterns('__pycache__', '*.pyc', 'setup_env.py')


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
                shutil.copytree(part, mim / part.name, ignore=NOT_SHIPPED)
            else:
                shutil.copy2(part, mim)


def read_version():
    text = (ROOT / 'mmbiformer' / '__init__.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = ['\"](.+?)['\"]", text, re.M).group(1)


def read_readme():
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


setup(
    name='mmbiformer',
    version=read_version(),
    description='BiFormer for MMDetection, MMSegmentation and MMPretrain',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    author='mmbiformer contributors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='computer vision, vision transformer, sparse attention, object detection, '
    'semantic segmentation, OpenMMLab',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['mmbiformer', 'mmbiformer.*']),
    package_data={'mmbiformer.ops.backends.cpp': ['*.cpp']},
    cmdclass={'build_py': BuildWithMim},
    python_requires='>=3.10,<3.13',
    # mmengine is needed as well, but either distribution may bring it: see the extras.
    install_requires=['torch>=2.4', 'numpy', 'safetensors', 'timm'],
    extras_require={
        'onedl': [
            'onedl-mmengine>=0.10.8,<0.11',
            'onedl-mmcv>=2.3,<2.4',
            'onedl-mmdetection>=3.5,<3.6',
            'onedl-mmsegmentation>=1.4,<1.5',
            'onedl-mmpretrain>=1.3,<1.4',
        ],
        'openmmlab': [
            'mmengine>=0.10.4,<0.11',
            'mmcv>=2.1,<2.2',
            'mmdet>=3.3,<3.4',
            'mmsegmentation>=1.2.2,<1.3',
            'mmpretrain>=1.2,<1.3',
            'ftfy',
            'regex',
        ],
        'export': ['onnx', 'onnxruntime', 'onnxscript'],
        'dev': [
            'hypothesis',
            'matplotlib',
            'pytest',
            'pytest-timeout',
            'pytest-xdist',
            'ruff',
            'tensorboard',
        ],
    },
    zip_safe=False,
)
