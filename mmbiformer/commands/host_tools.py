"""Run a tool that the host library of a config ships."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config

from ..errors import UserError


def run_host_tool(cfg: Config, paths: dict[str, str]) -> None:
    """Run the tool of a config's host with the command line of this process.

    Args:
        cfg: The whole config; its ``default_scope`` names the host.
        paths: The path of the tool in the tools folder of each host.

    Raises:
        UserError: If the host has no such tool, or was installed without its tools.
    """
    host = cfg.get('default_scope')
    if host not in paths:
        raise UserError(
            f'{cfg.filename} has default_scope={host!r}; only {", ".join(paths)} have this tool'
        )
    spec = find_spec(host)
    if spec is None:
        raise UserError(f'{cfg.filename} needs {host}, which is not installed')
    tool = Path(spec.origin).parent / '.mim' / 'tools' / paths[host]
    if not tool.is_file():
        raise UserError(
            f'{host} was installed without its tools ({tool} is missing); install it from a wheel'
        )
    sys.path.insert(0, str(tool.parent))  # as if the tool were called itself
    runpy.run_path(str(tool), run_name='__main__')
