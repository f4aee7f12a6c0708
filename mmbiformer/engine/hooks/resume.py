"""The checkpoint that a run resumes from."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object
from mmengine.runner import IterBasedTrainLoop, Runner

from ...errors import CheckpointError
from ...weights.read import read_checkpoint

PARTS = 'message_hub', 'meta', 'optimizer', 'state_dict'
"""Parts of a checkpoint that MMEngine needs to resume."""


def find_whole_checkpoint(
    folder: str | Path, out_dir: str | Path | None = None
) -> tuple[str | None, list[str]]:
    """Find the last checkpoint of a run; if it is damaged, the one before it.

    Only the structure of a file is read, not its tensors: the run reads those once, as it loads.

    Args:
        folder: The work folder of the run.
        out_dir: The folder of its checkpoints. Defaults to the work folder.

    Returns:
        tuple[str | None, list[str]]: Its path, or None if there is no checkpoint yet; and a warning
        for each damaged file that is newer.

    Raises:
        CheckpointError: If there are checkpoints, but the run cannot resume from any of them.
        PermissionError: If a file may not be read.
    """
    folders = [Path(path) for path in (out_dir, folder) if path is not None]
    last = Path()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        last = Path(Path(folder, 'last_checkpoint').read_text().strip())
    # The path may lead to the run that this folder was copied from: only its file name counts.
    found = [own / last.name for own in folders]
    found += _latest_first([path for own in folders for path in own.glob('*.pth')], last)
    found = [path for path in found if os.path.isfile(path)]
    if not found and os.path.isfile(last):
        raise CheckpointError(
            f'{folder} has no checkpoint of its own, but last_checkpoint there names {last}. To go '
            f'on from that one, give --resume {last}; to start from the beginning, remove '
            f'{Path(folder, "last_checkpoint")}'
        )
    damaged, unfit = [], []
    for path in dict.fromkeys(path.resolve() for path in found):
        try:
            checkpoint = read_checkpoint(path, mmap=True)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if missing := _missing(checkpoint):  # a best checkpoint has no optimizer
            unfit.append(f'{path} lacks {", ".join(missing)}')
        else:
            return str(path), [f'{reason}; resuming from {path}.' for reason in damaged]
    if damaged or unfit:
        raise CheckpointError(
            f'no checkpoint in {folder} can be resumed from:\n'
            + ''.join(f'  {reason}\n' for reason in [*damaged, *unfit])
            + 'Move them away to start from the beginning, name another with --resume FILE, or '
            'start from weights with --cfg-options load_from=FILE in another --work-dir.'
        )
    return None, []


def _latest_first(paths: list[Path], last: Path) -> list[Path]:
    """Sort checkpoints by the number in their name, as copying changes their time.

    Numbers above that of the last checkpoint belong to an earlier run in the same folder.
    """
    steps = {path: re.fullmatch(r'(epoch|iter)_(\d+)', path.stem) for path in [*paths, last]}
    comparable = len({step[1] for step in steps.values() if step}) == 1
    numbers = {path: int(step[2]) for path, step in steps.items() if step and comparable}

    def rank(path: Path) -> tuple[bool, int, float]:
        number = numbers.get(path, -1)
        return number <= numbers.get(last, number), number, os.path.getmtime(path)

    return sorted(filter(os.path.isfile, paths), key=rank, reverse=True)


def check_resumable(path: str | Path, checkpoint: Any) -> None:
    """Raise CheckpointError unless a loaded file holds the state of a training run.

    Args:
        path: Where it was loaded from, for the message.
        checkpoint: What it holds.
    """
    if missing := _missing(checkpoint):
        raise CheckpointError(
            f'{path} holds no training run to resume: it lacks {", ".join(missing)}. To start from '
            f'its weights use --pretrained (the backbone) or --cfg-options load_from={path} (the '
            'whole model)'
        )


def _missing(checkpoint: Any) -> list[str]:
    if not isinstance(checkpoint, dict):
        return [*PARTS]
    return [name for name in PARTS if not isinstance(checkpoint.get(name), dict)]


def check_same_point(runner: Runner) -> None:
    """Raise CheckpointError if processes would go on from different checkpoints.

    It happens where each node has a disk of its own and only the first one's holds checkpoints. The
    other processes would start anew and wait for the first at the end.

    Args:
        runner: The run, with its checkpoint loaded.
    """
    iterations = all_gather_object(runner.iter)
    if len({*iterations}) > 1:
        raise CheckpointError(
            'the processes are not at the same point: at iterations '
            f'{", ".join(map(str, iterations))}. They must find the same checkpoint: let the nodes '
            'share the work folder, or copy it from the first node to the others'
        )


def warn_if_finished(runner: Runner) -> None:
    """Warn if a resumed run has nothing left to train.

    Args:
        runner: The run, with its checkpoint loaded.
    """
    by_iter = isinstance(runner.train_loop, IterBasedTrainLoop)
    unit = 'iter' if by_iter else 'epoch'
    done = runner.iter if by_iter else runner.epoch
    end = runner.max_iters if by_iter else runner.max_epochs
    if done >= end:
        runner.logger.warning(
            f'The checkpoint is at {unit} {done} of {end}: nothing is left to train; raise '
            f'train_cfg.max_{unit}s to go on.'
        )
