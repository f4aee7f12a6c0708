"""How a command ends: which errors it explains, and the hints behind a traceback."""

import gc
import signal
import sys
from collections.abc import Callable

import torch

from ..errors import UserError, escaped

HINTS = (
    (
        'DataLoader worker (pid',
        'a data loader worker was killed, most often because memory ran out: lower num_workers or '
        'batch_size, then continue with --resume',
    ),
    (
        'No space left on device',
        'the disk is full: make room, then continue with --resume',
    ),
    (
        'out of memory',
        'memory ran out: lower batch_size or the image size, or free memory',
    ),
    (
        "can't allocate memory",
        'memory ran out: lower batch_size or the image size, or free memory',
    ),
    (
        'Expected more than 1 value per channel when training',
        'a BatchNorm has one value a channel to normalise: train on two or more images a batch, '
        'the last batch of an epoch too (drop_last=True)',
    ),
    (
        'The image size in a batch should be the same',
        'images of different sizes are validated one by one: set batch_size=1 in val_dataloader '
        'and test_dataloader',
    ),
    (
        'Excepted key in',
        'a schedule that waits for a plateau sees the figures of the validation only: set its '
        'monitor to one of these keys',
    ),
)
"""Part of an error message, and the line that follows its traceback."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command and end the process as it ended.

    A :class:`~mmbiformer.errors.UserError` is one message and exit status 2. Any other exception
    keeps its traceback, a hint may follow in one line, and the status is 1. Ctrl-C gives 130.

    Args:
        main: The command.
    """
    try:
        main()
        _leave_group()
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f'error: {escaped(str(error))}', file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        # PyTorch's handler may report a dead worker again while the traceback is printed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        error.__suppress_context__ = False  # MMEngine hides a hook's own TypeError
        sys.excepthook(type(error), error, error.__traceback__)
        if text := hint(error):
            print(f'hint: {text}', file=sys.stderr)
        sys.exit(1)


def hint(error: BaseException | None) -> str | None:
    """Find the hint for an error, or for the error that caused it.

    Args:
        error: Any exception.

    Returns:
        str | None: One line without a full stop; None if the table has nothing for it.
    """
    while error is not None:
        for part, text in HINTS:
            if part in str(error):
                return text
        error = error.__cause__ or error.__context__
    return None


def _leave_group() -> None:
    """Wait for the other processes of the job, so that none of them loses its peer."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # References to the group keep its threads alive, and one that still runs while the
        # interpreter shuts down aborts the process.
        gc.collect()
        torch.distributed.destroy_process_group()
