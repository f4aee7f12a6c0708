"""Trainings in several processes on CPU."""

import importlib
import multiprocessing
import os
import socket

import torch
from mmengine.config import Config

from tests.helpers.in_process import train


def free_port():
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def train_together(config, works, *options, status=0):
    """Run a training, one process for each of the work folders, as torchrun starts them.

    The processes are forks of this one, where nothing has to be imported again.

    Returns what each printed; each must end with this exit status.
    """
    host = Config.fromfile(config).default_scope
    if host != 'mmengine':
        importlib.import_module(f'{host}.utils').register_all_modules(init_default_scope=False)
    context = multiprocessing.get_context('fork')
    shared = dict(WORLD_SIZE=str(len(works)), MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    processes, pipes = [], []
    for rank, work in enumerate(works):
        environment = dict(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        ours, theirs = context.Pipe(duplex=False)
        args = (theirs, environment, (config, work, '--launcher', 'pytorch', *options), status)
        process = context.Process(target=_train, args=args, daemon=False)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return [pipe.recv() for pipe in pipes if pipe.poll(240)]
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def _train(pipe, environment, args, status):
    torch.set_num_threads(1)
    os.environ.update(environment)
    pipe.send(train(*args, status=status))
