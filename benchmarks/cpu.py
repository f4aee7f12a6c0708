"""A backbone on CPU beside the published formulation, in one run: time, memory in training.

Examples:
    python -m benchmarks.cpu --out benchmarks/results/cpu.json
    python -m benchmarks.cpu debiformer --repeats 1 --out benchmarks/results/cpu_debiformer.json
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.gather_baseline import gather_baseline
from mmbiformer import __version__
from mmbiformer.models import BiFormer, DeBiFormer

# The small models: batch, sizes of the images for the forward pass and for training, arguments.
CASES = dict(
    biformer=(BiFormer, 8, (224, 224), (224, 224), dict(final_norm=True)),
    debiformer=(DeBiFormer, 1, (800, 1344), (512, 512), dict(region_grid=16)),
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', nargs='?', choices=CASES, default='biformer')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--out', type=Path, help='write the results as JSON')
    parser.add_argument('--peak', choices=['published', 'ours'], help=argparse.SUPPRESS)
    return parser.parse_args()


def make(name: str, model: str) -> nn.Module:
    """The same weights for both."""
    torch.manual_seed(0)
    backbone, *_, kwargs = CASES[model]
    net = backbone('small', **kwargs)
    return gather_baseline(net) if name == 'published' else net


def train_step(net: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward."""
    net.zero_grad(set_to_none=True)
    sum(out.square().mean() for out in net(x)).backward()


def side_by_side(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each step, taken in turns so that a slow spell hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:  # the first warms up
                times[name].append(time.perf_counter() - start)
        print(f'\r  {repeat}/{repeats}', end='', flush=True)
    print('\r', end='')
    return {name: statistics.median(values) for name, values in times.items()}


def peak_of_training(name: str, args: argparse.Namespace) -> int:
    """Bytes a training step adds to a process of its own, at its peak."""
    command = [sys.executable, '-m', 'benchmarks.cpu', args.model, '--peak', name]
    command += ['--threads', str(args.threads)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure_peak(net: nn.Module, x: torch.Tensor) -> int:
    """In the process of its own: what one step adds to the resident set."""
    status = Path('/proc/self/status')
    base = int(status.read_text().split('VmRSS:')[1].split()[0])
    train_step(net, x)
    return 1024 * (int(status.read_text().split('VmHWM:')[1].split()[0]) - base)


def main() -> None:
    """Measure, print a table, write JSON."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    _, batch, size, train_size, _ = CASES[args.model]
    x, x_train = torch.randn(batch, 3, *size), torch.randn(batch, 3, *train_size)
    if args.peak:
        print(measure_peak(make(args.peak, args.model), x_train))
        return
    nets = {name: make(name, args.model) for name in ('published', 'ours')}
    with torch.no_grad():
        published, ours = (net.eval()(x_train)[-1] for net in nets.values())
    difference = ((published - ours).abs().max() / published.abs().max()).item()

    def forward(net: nn.Module) -> None:
        with torch.no_grad():
            net(x)

    rows = {}
    rows['forward'] = side_by_side(
        {name: lambda net=net: forward(net) for name, net in nets.items()}, args.repeats
    )
    for net in nets.values():
        net.train()
    rows['training step'] = side_by_side(
        {name: lambda net=net: train_step(net, x_train) for name, net in nets.items()}, args.repeats
    )
    peaks = {name: peak_of_training(name, args) for name in nets}

    sizes = ', training '.join(f'{height}x{width}' for height, width in (size, train_size))
    print(f'{args.model}, small, batch {batch}, {sizes}, float32, {args.threads} threads, median')
    print(f'largest relative difference of the outputs: {difference:.1e}')
    print(f'{"":16}{"published":>12}{"ours":>12}{"ratio":>8}')
    for name, row in rows.items():
        ratio = row['published'] / row['ours']
        print(f'{name:16}{row["published"]:>10.3f} s{row["ours"]:>10.3f} s{ratio:>7.2f}x')
    ratio = peaks['ours'] / peaks['published']
    print(
        f'{"peak memory":16}{peaks["published"] / 2**30:>8.2f} GiB{peaks["ours"] / 2**30:>8.2f} GiB'
        f'{ratio:>7.2f}x'
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = dict(
            seconds=rows,
            peak_bytes_training=peaks,
            difference=difference,
            model=args.model,
            batch=batch,
            repeats=args.repeats,
            size=size,
            train_size=train_size,
            threads=args.threads,
            torch=torch.__version__,
            mmbiformer=__version__,
            python=platform.python_version(),
            processor=processor(),
            date=time.strftime('%Y-%m-%d'),
        )
        args.out.write_text(json.dumps(record, indent=2) + '\n')
        print(f'wrote {args.out}')


def processor() -> str:
    """Name of the processor."""
    for line in Path('/proc/cpuinfo').read_text().splitlines():
        if line.startswith('model name'):
            return line.split(':', 1)[1].strip()
    return platform.processor()


if __name__ == '__main__':
    main()
