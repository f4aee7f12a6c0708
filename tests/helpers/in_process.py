"""A command of tools/ run in this process, where nothing has to be imported again."""

import contextlib
import io
import itertools
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

from mmbiformer.commands.faults import run_command

TOOLS = Path(__file__).parents[2] / 'tools'
NUMBERS = itertools.count()


def run_tool(name, *options, status=0, **environment):
    """Run a command, which must end with this exit status; give what it printed."""
    (path,) = TOOLS.rglob(f'{name}.py')
    argv, found, printed = [str(path), *map(str, options)], 0, io.StringIO()
    with (
        mock.patch.object(sys, 'argv', argv),
        mock.patch.object(sys, 'path', [str(path.parent), *sys.path]),  # as Python does
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
    """Run a training; give what it printed."""
    # MMEngine keeps one logger a name for the whole process.
    name = ('--cfg-options', f'experiment_name=run{next(NUMBERS)}')
    return run_tool('train', config, '--work-dir', work, *options, *name, **kwargs)
