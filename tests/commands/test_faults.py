"""How commands end."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from mmengine.optim import ReduceOnPlateauLR
from mmseg.models import SegDataPreProcessor
from mmseg.structures import SegDataSample
from torch.utils.data import DataLoader, Dataset

from mmbiformer.commands.faults import HINTS, hint, run_command
from mmbiformer.errors import CheckpointError, UserError


def end_of(main, capsys):
    """Run a command; give its exit status and what it printed to stderr."""
    status = 0
    try:
        run_command(main)
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize('error', [UserError('take another'), CheckpointError('take another')])
def test_user_error_is_one_message(error, capsys):
    assert end_of(raising(error), capsys) == (2, 'error: take another\n')


def test_message_does_not_control_the_terminal(capsys):
    _, printed = end_of(raising(UserError('\x1b[31mred\nline')), capsys)
    assert printed == 'error: \\x1b[31mred\nline\n'


@pytest.mark.parametrize('kind', [ValueError, KeyError, RuntimeError, OSError, AssertionError])
def test_any_other_error_keeps_its_traceback(kind, capsys):
    status, printed = end_of(raising(kind('anything')), capsys)
    assert status == 1
    assert printed.startswith('Traceback (most recent call last)')
    assert f'File "{__file__}"' in printed
    assert printed.rstrip().splitlines()[-1].startswith(kind.__name__)


def test_interrupt(capsys):
    assert end_of(raising(KeyboardInterrupt()), capsys) == (130, 'interrupted\n')


class Images(Dataset):
    """One image, whose worker process is killed as it is read."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def killed_worker():
    next(iter(DataLoader(Images(), num_workers=1)))


def full_disk():
    with open('/dev/full', 'w') as file:
        file.write('x')


def out_of_memory():
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ('fault', 'advice'),
    [
        (killed_worker, 'lower num_workers or batch_size'),
        (full_disk, 'make room, then continue with --resume'),
        (out_of_memory, 'lower batch_size or the image size'),
    ],
)
def test_hint_follows_the_traceback(fault, advice):
    """In a process of its own, as a killed worker is reported to the process by a signal."""
    code = f'from tests.commands.test_faults import *; run_command({fault.__name__})'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'Traceback' in done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith('hint: ') and advice in last


def test_hint_of_a_gpu():
    """PyTorch's words, which no test can provoke without a GPU."""
    assert 'lower batch_size' in hint(torch.OutOfMemoryError('CUDA out of memory. Tried to'))


def one_value_a_channel():
    torch.nn.BatchNorm2d(4)(torch.ones(1, 4, 1, 1))


def validation_images_of_two_sizes():
    images = [torch.ones(3, 8, 8), torch.ones(3, 8, 9)]
    SegDataPreProcessor()(dict(inputs=images, data_samples=[SegDataSample(), SegDataSample()]))


def plateau_of_the_loss():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=1.0)
    ReduceOnPlateauLR(optimizer, monitor='loss').step(dict(mIoU=1.0))


@pytest.mark.parametrize(
    ('fault', 'advice'),
    [
        (one_value_a_channel, 'two or more images a batch'),
        (validation_images_of_two_sizes, 'set batch_size=1 in val_dataloader'),
        (plateau_of_the_loss, 'one of these keys'),
    ],
)
def test_hint_of_a_late_error(fault, advice, capsys):
    status, printed = end_of(fault, capsys)
    assert status == 1
    assert advice in printed.rstrip().splitlines()[-1]


def test_hint_of_the_cause():
    error = RuntimeError('anything')
    error.__cause__ = RuntimeError(HINTS[0][0])
    assert hint(error) == HINTS[0][1]
    assert hint(RuntimeError('anything')) is None
