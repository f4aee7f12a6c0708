"""A command of tools/ run in this process, where nothing has to be imported anew."""

import contextlib
import io
import itertools
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

from mmbiformer.engine.command_line import run_command

TOOLS = Path(__file__).parent.parent / 'tools'
NUMBERS = itertools.count()


def run_tool(name, *options, status=0, **environment):
    """What a command prints; it must end with this exit status."""
    (path,) = TOOLS.rglob(f'{name}.py')
    argv, found, printed = [str(path), *map(str, options)], 0, io.StringIO()
    with (
        mock.patch.object(sys, 'argv', argv),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        main = runpy.run_path(str(path), run_name='tool')['main']
        try:
            run_command(main)
        except SystemExit as end:
            found = end.code
    assert found == status, printed.getvalue()[-3000:]
    return printed.getvalue()


def train(config, work, *options, **kwargs):
    """What a training prints."""
    # MMEngine keeps the log of a name for the process.
    name = ('--cfg-options', f'experiment_name=run{next(NUMBERS)}')
    return run_tool('train', config, '--work-dir', work, *options, *name, **kwargs)
