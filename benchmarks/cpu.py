"""Time of the backbones on CPU beside alternatives, and memory in training.

The candidates of a ratio take turns in one run. Results are written after each round, so a command
that is stopped, or runs out of memory, leaves what it has measured.

Examples:
    python -m benchmarks.cpu --out benchmarks/results/cpu.json
    python -m benchmarks.cpu debiformer --repeats 1 --out benchmarks/results/cpu_debiformer.json
    python -m benchmarks.cpu grids --quick
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 python -m benchmarks.cpu grids
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor.utils import fresh_inductor_cache

from benchmarks.gather_baseline import gather_baseline
from mmbiformer import __version__
from mmbiformer.commands.faults import run_command
from mmbiformer.errors import UserError
from mmbiformer.export.aoti import run_package, write_package
from mmbiformer.export.graph import Exportable, trace
from mmbiformer.export.onnx import run_onnx, write_onnx
from mmbiformer.export.verify import check
from mmbiformer.layers import FullAttention
from mmbiformer.models import BiFormer, DeBiFormer
from mmbiformer.models.hierarchical import HEAD_DIM

# The small models: batch, image sizes for the forward pass and for training, arguments.
CASES = dict(
    biformer=(BiFormer, 8, (224, 224), (224, 224), dict(final_norm=True)),
    debiformer=(DeBiFormer, 1, (800, 1344), (512, 512), dict(region_grid=16)),
    coco=(BiFormer, 1, (800, 1344), (800, 1344), dict(region_grid=16)),
)
# Memory of the process while it runs the published formulation of a case.
NEEDED_BYTES = dict(coco=19 * 2**30)
RIVALS = {
    'BiFormer-S': 'biformer_small',
    'Swin-S': 'swin_small_patch4_window7_224',
    'ConvNeXt-S': 'convnext_small',
}
# Settings of glibc's allocator. By default it gives every tensor above 32 MB back to the system.
# Getting the memory again costs images of 2048x2048 about a third of their time.
MALLOC = 'MALLOC_MMAP_MAX_', 'MALLOC_TRIM_THRESHOLD_'
SIDES = 512, 1024, 2048
DENSE_UP_TO = 1024  # at 2048 dense attention would take half an hour
QUICK = dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 128, 256))


class Report:
    """The record of one command; the file is written whole after every change.

    Args:
        args: The command line.
        **facts: What else to record.
    """

    module = 'benchmarks.cpu'  # measures memory, in a process of its own

    def __init__(self, args: argparse.Namespace, **facts: Any) -> None:
        self.args = args
        self.record: dict[str, Any] = dict(
            seconds={},
            times={},
            **facts,
            module=self.module,
            model=args.model,
            repeats=args.repeats,
            threads=args.threads,
            torch=torch.__version__,
            mmbiformer=__version__,
            python=platform.python_version(),
            processor=processor(),
            malloc={key: os.environ[key] for key in sorted(os.environ) if key in MALLOC},
            date=time.strftime('%Y-%m-%d'),
        )
        if args.quick:
            self.record['quick'] = True

    def note(self, **facts: Any) -> None:
        """Record facts, and write everything."""
        self.record.update(facts)
        if self.args.out:
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            draft = self.args.out.with_suffix('.tmp')
            draft.write_text(json.dumps(self.record, indent=2) + '\n')
            os.replace(draft, self.args.out)

    def time(self, row: str, steps: dict[str, Callable[[], object]]) -> None:
        """Take the median seconds of each step; the steps take turns, so a slow spell hits all."""
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(self.args.repeats + 1):
            for name, step in steps.items():
                progress(f'{row}, {name}: {repeat}/{self.args.repeats}')
                start = time.perf_counter()
                step()
                if repeat:  # the first warms up
                    times[name].append(time.perf_counter() - start)
            if repeat:
                self.record['times'][row] = times
                self.record['seconds'][row] = {
                    name: statistics.median(values) for name, values in times.items()
                }
                self.note()
        progress('')
        medians = self.record['seconds'][row]
        first = next(iter(medians.values()))
        width = max(16, *(len(name) + 2 for name in medians))
        print(f'{row:20}' + ''.join(f'{name:>{width}}' for name in medians))
        for cell in (lambda seconds: f'{seconds:.3f} s', lambda seconds: f'{first / seconds:.2f}x'):
            print(f'{"":20}' + ''.join(f'{cell(value):>{width}}' for value in medians.values()))

    def peaks(self, names: list[str]) -> None:
        """Measure what a training step of each adds to its process, at its peak, in bytes."""
        peaks = {}
        for name in names:
            progress(f'peak memory, {name}')
            command = [sys.executable, '-m', self.module, self.args.model, '--peak', name]
            command += ['--threads', str(self.args.threads), *['--quick'] * self.args.quick]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f'peak memory, {name}: not measured, exit status {done.returncode}')
                continue
            peaks[name] = int(done.stdout)
            self.note(peak_bytes_training=peaks)
        progress('')
        cells = ''.join(f'{peak / 2**30:>12.2f} GiB' for peak in peaks.values())
        print(f'{"peak memory":20}' + cells)


def progress(text: str) -> None:
    """Show what is measured: a terminal gets one line, a log one line each."""
    if sys.stderr.isatty():
        print(f'\r\x1b[K{text}', end='', file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def small(backbone: type, args: argparse.Namespace, **kwargs: Any) -> nn.Module:
    """The small model, or a toy with ``--quick``, with the same weights each time."""
    torch.manual_seed(0)
    toy = dict(QUICK, mlp_ratio=1) if backbone is BiFormer else QUICK
    return backbone(toy if args.quick else 'small', **kwargs)


def image(args: argparse.Namespace, batch: int, size: tuple[int, int]) -> torch.Tensor:
    """The same images each time; with ``--quick`` at most two, of an eighth of the size."""
    if args.quick:
        batch, size = min(batch, 2), [n // 8 for n in size]
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def forward(net: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A step: forward, without gradients."""
    return torch.no_grad()(lambda: net(x))


def training_step(net: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A step: forward and backward."""

    def step() -> None:
        net.zero_grad(set_to_none=True)
        sum(out.square().mean() for out in net(x)).backward()

    return step


def candidate(name: str, args: argparse.Namespace) -> nn.Module:
    """A case's model in the published formulation or ours, with the same weights."""
    backbone, *_, kwargs = CASES[args.model]
    net = small(backbone, args, **kwargs)
    return gather_baseline(net) if name == 'published' else net


def run_case(args: argparse.Namespace) -> None:
    """Beside the published formulation: forward, training step, memory."""
    backbone, batch, size, train_size, _ = CASES[args.model]
    x, x_train = (image(args, batch, each) for each in (size, train_size))
    if args.peak:
        print(measure_peak(candidate(args.peak, args), x_train))
        return
    check_memory(NEEDED_BYTES.get(args.model, 0), args)
    report = Report(args, batch=len(x), size=x.shape[2:], train_size=x_train.shape[2:])
    sizes = ', training '.join(f'{each[2]}x{each[3]}' for each in (x.shape, x_train.shape))
    print(f'{backbone.__name__}-S, batch {len(x)}, {sizes}, float32, {args.threads} threads')
    nets = {name: candidate(name, args).eval() for name in ('published', 'ours')}
    with torch.no_grad():
        published, ours = (net(x_train)[-1] for net in nets.values())
    difference = ((published - ours).abs().max() / published.abs().max()).item()
    print(f'largest relative difference of the outputs: {difference:.1e}')
    report.note(difference=difference)
    report.time('forward', {name: forward(net, x) for name, net in nets.items()})
    report.time(
        'training step', {name: training_step(net.train(), x_train) for name, net in nets.items()}
    )
    report.peaks([*nets])


def measure_peak(net: nn.Module, x: torch.Tensor) -> int:
    """Measure the bytes that one step adds to the resident set of this process."""
    status = Path('/proc/self/status')
    base = int(status.read_text().split('VmRSS:')[1].split()[0])
    training_step(net, x)()
    return 1024 * (int(status.read_text().split('VmHWM:')[1].split()[0]) - base)


def check_memory(needed: int, args: argparse.Namespace) -> None:
    """Raise UserError if the system would kill the process for want of memory."""
    available = int(Path('/proc/meminfo').read_text().split('MemAvailable:')[1].split()[0]) * 1024
    if available < needed and not args.quick:
        raise UserError(
            f'{args.model}: the published formulation needs {needed / 2**30:.0f} GiB of memory and '
            f'{available / 2**30:.1f} GiB are free; close other programs or take a larger machine'
        )


def run_rivals(args: argparse.Namespace) -> None:
    """Classifiers without their last layer, forward, beside timm's."""
    import timm

    import mmbiformer.hub.timm  # noqa: F401  (registers ours)

    x = torch.randn(1 if args.quick else 8, 3, 224, 224)
    report = Report(args, batch=len(x), size=x.shape[2:], timm=version('timm'))
    print(f'batch {len(x)}, 224x224, float32, {args.threads} threads')
    nets = {name: timm.create_model(key, num_classes=0).eval() for name, key in RIVALS.items()}
    # Convolutions run faster in this format; ours chooses it by itself.
    nets = {name: net.to(memory_format=torch.channels_last) for name, net in nets.items()}
    x = x.to(memory_format=torch.channels_last)
    report.time('forward', {name: forward(net, x) for name, net in nets.items()})


def run_half(args: argparse.Namespace) -> None:
    """In bfloat16: fused attention beside PyTorch's, float32 and ConvNeXt-S."""
    import timm

    shape, rival = (8, 3, 224, 224), RIVALS['ConvNeXt-S']
    if args.quick:
        shape, rival = (1, 3, 64, 64), 'convnext_atto'
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    report = Report(args, batch=len(x), size=x.shape[2:], timm=version('timm'))
    print(f'BiFormer-S, batch {len(x)}, bfloat16, {args.threads} threads')
    nets = {
        'fused': small(BiFormer, args, final_norm=True),
        'sdpa': small(BiFormer, args, final_norm=True, backend='sdpa'),
        'ConvNeXt-S': timm.create_model(rival, num_classes=0),
    }
    nets = {name: net.to(memory_format=torch.channels_last) for name, net in nets.items()}
    steps = {f'{name}, autocast': _autocast(training_step(net, x)) for name, net in nets.items()}
    steps['fused, float32'] = training_step(nets['fused'], x)
    report.time('training step', steps)
    whole = {'fused, float32': forward(nets['fused'].eval(), x)}
    half = {name: copy.deepcopy(net).eval().bfloat16() for name, net in nets.items()}
    whole |= {name: forward(net, x.bfloat16()) for name, net in half.items()}
    report.time('forward', whole)


def _autocast(step: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.autocast('cpu', torch.bfloat16):
            return step()

    return run


def run_deterministic(args: argparse.Namespace) -> None:
    """Cost of ``torch.use_deterministic_algorithms(True)`` in a training step."""
    x = image(args, 8, (224, 224))
    report = Report(args, batch=len(x), size=x.shape[2:])
    print(f'BiFormer-S, batch {len(x)}, {x.shape[2]}x{x.shape[3]}, {args.threads} threads')
    step = training_step(small(BiFormer, args, final_norm=True).train(), x)

    def deterministic_step() -> None:
        torch.use_deterministic_algorithms(True)
        try:
            step()
        finally:
            torch.use_deterministic_algorithms(False)

    report.time('training step', {'default': step, 'deterministic': deterministic_step})


def run_compile(args: argparse.Namespace) -> None:
    """``torch.compile`` beside eager mode; its first call is timed separately."""
    x = image(args, 8, (224, 224))
    report = Report(args, batch=len(x), size=x.shape[2:])
    print(f'BiFormer-S, batch {len(x)}, {x.shape[2]}x{x.shape[3]}, {args.threads} threads')
    eager = small(BiFormer, args, final_norm=True).eval()
    compiled = torch.compile(small(BiFormer, args, final_norm=True).eval())
    first = {}
    for row, make in (('forward', forward), ('training step', training_step)):
        if make is training_step:
            eager.train(), compiled.train()
        steps = {'eager': make(eager, x), 'compiled': make(compiled, x)}
        progress(f'{row}: compiling, which takes minutes')
        start = time.perf_counter()
        with fresh_inductor_cache():  # an earlier run's kernels must not be found
            steps['compiled']()
        first[row] = time.perf_counter() - start
        progress('')
        print(f'{row}: compiled in {first[row]:.0f} s')
        report.note(compile_seconds=first)
        report.time(row, steps)


def run_export(args: argparse.Namespace) -> None:
    """The backbone as files that run without this package, beside eager mode."""
    size = tuple(image(args, 1, (224, 224)).shape[2:])
    report = Report(args, size=size, onnxruntime=version('onnxruntime'))
    print(f'BiFormer-S for images of {size[0]}x{size[1]}, forward, {args.threads} threads')
    eager = small(BiFormer, args, final_norm=True).eval()
    formats = {
        'ONNX Runtime': ('maps.onnx', write_onnx, partial(run_onnx, threads=args.threads)),
        'AOTInductor': ('maps.pt2', write_package, run_package),
    }
    runners, made = {}, {}
    for any_size in (False, True):
        net = Exportable(small(BiFormer, args, final_norm=True, backend='sdpa'), any_size)
        for runtime, (file, write, load) in formats.items():
            name = f'{runtime}, any size' if any_size else runtime
            progress(f'{name}: exporting, which takes minutes')
            start = time.perf_counter()
            program = trace(net, size)
            with tempfile.TemporaryDirectory() as folder:
                write(program, Path(folder, file), net)
                made[name] = time.perf_counter() - start
                runners[name] = load(Path(folder, file))
            progress('')
            print(f'{name}: exported in {made[name]:.0f} s, {check(net, runners[name], size)}')
            report.note(export_seconds=made)
    for batch in (1, 8):
        x = image(args, batch, (224, 224))
        steps = {'eager': forward(eager, x)}
        steps |= {name: partial(run, x) for name, run in runners.items()}
        report.time(f'{len(x)} x {x.shape[2]}x{x.shape[3]}', steps)


def run_grids(args: argparse.Namespace) -> None:
    """Time by image size: ``region_grid='auto'``, fixed grids, dense attention."""
    report = Report(args, batch=1)
    print(f'BiFormer-S, one image, forward, float32, {args.threads} threads')
    grids = {'auto': 'auto', '7x7': 7, '16x16': 16}
    nets = {name: small(BiFormer, args, region_grid=grid) for name, grid in grids.items()}
    nets['dense'] = dense(small(BiFormer, args))
    for side in SIDES:
        x = image(args, 1, (side, side))
        names = [name for name in nets if name != 'dense' or side <= DENSE_UP_TO]
        report.time(f'{side}x{side}', {name: forward(nets[name].eval(), x) for name in names})
    least, most = (f'{side}x{side}' for side in (SIDES[0], SIDES[-1]))
    for name in grids:
        seconds = [report.record['seconds'][row][name] for row in (least, most)]
        growth = seconds[1] / seconds[0] * (SIDES[0] / SIDES[-1]) ** 2
        print(f'{name:6} time per pixel, {most} against {least}: {growth:.2f}x')


def dense(net: BiFormer) -> BiFormer:
    """Let all tokens attend to all in every stage, in place."""
    for stage in net.stages[:-1]:
        for block in stage:
            dim = len(block.norm1.weight)
            block.attn = FullAttention(dim, dim // HEAD_DIM, lepe_source='value')
    return net


# The function of a command, and how often its steps are timed.
COMMANDS = dict(
    biformer=(run_case, 7),
    debiformer=(run_case, 1),
    rivals=(run_rivals, 7),
    half=(run_half, 5),
    deterministic=(run_deterministic, 15),
    coco=(run_case, 1),
    compile=(run_compile, 5),
    export=(run_export, 7),
    grids=(run_grids, 1),
)


def parse_args(doc: str, commands: dict[str, Any], default: str) -> argparse.Namespace:
    """Read the command line.

    Args:
        doc: What the commands do, and examples.
        commands: For each command its function, and how often its steps are timed.
        default: The command that needs no name.
    """
    parser = argparse.ArgumentParser(
        description=doc.split('\n\nExamples')[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='\n'.join(
            f'{name:14} {run.__doc__.splitlines()[0]}' for name, (run, _) in commands.items()
        ),
    )
    parser.add_argument('model', nargs='?', choices=commands, default=default)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeats', type=int, help='timings of each step (default: by command)')
    parser.add_argument('--out', type=Path, help='write the results as JSON')
    parser.add_argument(
        '--quick', action='store_true', help='see that a command works: toy models, small images'
    )
    parser.add_argument('--peak', choices=['published', 'ours'], help=argparse.SUPPRESS)
    return parser.parse_args()


def main(doc: str, commands: dict[str, Any], default: str) -> None:
    """Measure, print tables, write JSON; see :func:`parse_args`."""
    args = parse_args(doc, commands, default)
    torch.set_num_threads(args.threads)
    run, repeats = commands[args.model]
    if args.repeats is None:
        args.repeats = 1 if args.quick else repeats
    if args.repeats < 1 or args.threads < 1:
        raise UserError('--repeats and --threads must be positive')
    run(args)
    if args.out:
        print(f'wrote {args.out}')


def processor() -> str:
    """Name of the processor."""
    for line in Path('/proc/cpuinfo').read_text().splitlines():
        if line.startswith('model name'):
            return line.split(':', 1)[1].strip()
    return platform.processor()


if __name__ == '__main__':
    run_command(partial(main, __doc__, COMMANDS, 'biformer'))
