"""Packages of AOTInductor: code for the CPU, compiled from a graph."""

from pathlib import Path

import torch
from torch.export import ExportedProgram

from .graph import Exportable
from .verify import Runner


def write_package(program: ExportedProgram, path: Path, net: Exportable) -> None:
    """Compile a graph for the CPU and write the package; needs a C++ compiler."""
    # The assertions would refuse maps with regions of one token, because the example's regions have
    # several. The code is right for such maps: the tests go down to images of one pixel.
    options = dict(scalar_asserts=False)
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=options
    )


def run_package(path: Path) -> Runner:
    """Load a package."""
    package = torch._inductor.aoti_load_package(str(path))
    return lambda images: list(package(images))
