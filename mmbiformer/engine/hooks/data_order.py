"""The order of the training data, and the seeds of the workers that load them."""

import itertools
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.runner import Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import BatchSampler, DataLoader


def sampler_of(loader: DataLoader) -> Any:
    """Give the sampler of a data loader, which may be inside its batch sampler.

    Args:
        loader: The data loader.
    """
    return getattr(loader.batch_sampler, 'sampler', None) or loader.sampler


def can_begin_anywhere(loader: DataLoader) -> bool:
    """Say whether the data come in the order of an ``InfiniteSampler``, batch by batch.

    Args:
        loader: The data loader.
    """
    return (
        type(loader.batch_sampler) is BatchSampler
        and isinstance(loader.sampler, InfiniteSampler)
        and type(loader.sampler).__iter__ is InfiniteSampler.__iter__
    )


def seed_workers(loader: DataLoader, runner: Runner) -> None:
    """Let the next workers of a data loader take their seeds from the run's seed and iteration.

    MMEngine gives them the same seeds in every epoch (findings/mmengine-workers-repeat.sh).

    Args:
        loader: The data loader; changed in place.
        runner: The run.
    """
    loader.worker_init_fn = partial(_seed_worker, seed=(runner.seed, runner.iter, runner.rank))
    loader._iterator = None  # ends persistent workers: only new ones are seeded


def _seed_worker(worker: int, seed: tuple[int, ...]) -> None:
    words = np.random.SeedSequence([*seed, worker]).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])


class EndlessBatches:
    """The data iterator of iteration-based training, which can begin at any iteration.

    Args:
        loader: The data loader, see :func:`can_begin_anywhere`.
        runner: The run; its current iteration is where the data begin.
    """

    def __init__(self, loader: DataLoader, runner: Runner) -> None:
        self.loader, self.runner = loader, runner
        # To skip batches, the original MMEngine asks for each of them; OneDL's calls skip_iter.
        one_by_one = not hasattr(_InfiniteDataloaderIterator, 'skip_iter')
        self.skipped = runner.iter if one_by_one else 0
        self.begin(runner.iter)

    def begin(self, iteration: int) -> None:
        """Go on at an iteration, with new workers."""
        sampler = self.loader.sampler
        start = iteration * self.loader.batch_size
        sampler.indices = itertools.islice(sampler._indices_of_rank(), start, None)
        self.iterator: Iterator | None = None

    def skip_iter(self, count: int) -> None:
        """Do nothing: the data already begin at the right iteration."""

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self.skipped:
            self.skipped -= 1
            return None
        if self.iterator is None:
            seed_workers(self.loader, self.runner)
            self.iterator = iter(self.loader)
        return next(self.iterator)
