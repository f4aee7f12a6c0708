"""Run a tool that the host library of a config ships."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config

from .checks import CommandError


def run_host_tool(cfg: Config, paths: dict[str, str]) -> None:
    """Run the tool of a config's host with this process's own command line.

    Args:
        cfg: The whole config; its ``default_scope`` names the host.
        paths: For each host the path of the tool in its folder of tools.

    Raises:
        CommandError: If the host has no such tool, or was installed without its tools.
    """
    host = cfg.get('default_scope')
    if host not in paths:
        raise CommandError(f'{cfg.filename}: {host} has no such tool, only {[*paths]} have')
    spec = find_spec(host)
    if spec is None:
        raise CommandError(f'{cfg.filename} needs {host}, which is not installed')
    tool = Path(spec.origin).parent / '.mim' / 'tools' / paths[host]
    if not tool.is_file():
        raise CommandError(f'{host} was installed without its tools: there is no {tool}')
    # Its own folder comes first on the path, as if it were called itself.
    sys.path.insert(0, str(tool.parent))
    runpy.run_path(str(tool), run_name='__main__')
