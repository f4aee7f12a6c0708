"""Compile a classifier, or the backbone of any config, with AOTInductor into one file for the CPU.

Inputs and outputs are those of export_onnx.py. The file is a package (.pt2) that torch loads
without this project: torch._inductor.aoti_load_package, or AOTIModelPackageLoader in C++. Needs a
C++ compiler.

Example:
    python tools/deployment/export_aoti.py configs/biformer_s_in1k.py FILE.pth --out biformer_s.pt2
"""

import torch

from mmbiformer.commands.export import run_export
from mmbiformer.commands.faults import run_command
from mmbiformer.export.aoti import run_package, write_package


def main() -> None:
    """Export."""
    run_export(
        description=__doc__.splitlines()[0],
        suffix='.pt2',
        needs=(),
        note=f'for the CPU, torch {torch.__version__}',
        write=write_package,
        load=run_package,
    )


if __name__ == '__main__':
    run_command(main)
