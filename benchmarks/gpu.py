"""Time of the fused attention and of BiFormer-S on one GPU, beside alternatives.

The comparison with the float64 reference comes first. A measurement that fails, e.g. for lack of
memory, is recorded as failed, and the others go on.

Example:
    python -m benchmarks.gpu --out benchmarks/results/gpu.json
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gather_baseline import gather_attention, gather_baseline
from mmbiformer import __version__
from mmbiformer.commands.faults import run_command
from mmbiformer.errors import UserError
from mmbiformer.models import BiFormer
from mmbiformer.ops import route_regions, routed_attention
from mmbiformer.ops.regions import region_of_token, split_regions

HEAD_DIM = 32
WIDTH = 32  # of a column of the tables
STARTED = time.perf_counter()


@dataclass
class Stage:
    """Attention of one stage of a network; sizes in tokens."""

    size: tuple[int, int]
    region: tuple[int, int]
    topk: int
    channels: int
    head_dim: int = HEAD_DIM
    hub: bool = False  # every region is routed to the first regions

    def maps(self, batch: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """Queries, keys and values as slices of one projection, and their routes."""
        packed = torch.randn(batch, *self.size, 3 * self.channels, device='cuda', dtype=dtype)
        maps = list(packed.chunk(3, -1))
        routes = route_regions(*maps[:2], self.topk, self.region)
        if self.hub:
            routes = torch.arange(self.topk, device='cuda').expand_as(routes)
        return maps, routes

    def options(self) -> dict[str, Any]:
        """Options of :func:`mmbiformer.ops.routed_attention`."""
        heads = self.channels // self.head_dim
        return dict(num_heads=heads, region_size=self.region, scale=self.channels**-0.5)


# The stages of BiFormer-S at 224x224.
STAGES = {
    'stage 1': Stage((56, 56), (8, 8), 1, 64),
    'stage 2': Stage((28, 28), (4, 4), 4, 128),
    'stage 3': Stage((14, 14), (2, 2), 16, 256),
}
# Shapes that are checked and not timed.
AWKWARD = {
    'stage 1 at 800x1344': Stage((208, 336), (13, 21), 1, 64),
    'stage 2 at 800x1333, ragged': Stage((100, 167), (7, 11), 4, 128),
    'stage 3 at 512x512': Stage((32, 32), (4, 4), 16, 256),
    'ragged, one route': Stage((31, 33), (8, 8), 1, 64),
    'one token a region': Stage((9, 7), (1, 1), 7, 64),
    'all routes': Stage((12, 20), (4, 4), 15, 64),
    'small and ragged': Stage((15, 13), (2, 3), 9, 64),
    'head dim 24': Stage((28, 28), (4, 4), 4, 72, head_dim=24),
    'head dim 40': Stage((16, 24), (8, 4), 3, 120, head_dim=40),
    'head dim 100': Stage((14, 14), (2, 2), 8, 100, head_dim=100),
    'hub': Stage((56, 56), (8, 8), 1, 64, hub=True),
    'hub, ragged': Stage((30, 27), (4, 4), 3, 64, hub=True),
}
DTYPES = torch.float32, torch.float16, torch.bfloat16


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--repeats', type=int, default=30)
    parser.add_argument(
        '--compile',
        action='store_true',
        help='also time networks whose blocks are compiled by torch.compile, which takes minutes',
    )
    parser.add_argument('--out', type=Path, help='write the results as JSON')
    return parser.parse_args()


def progress(what: str) -> None:
    """Print what is measured next, with the time so far."""
    print(f'{time.perf_counter() - STARTED:6.0f} s  {what}', flush=True)


def attempt(measure: Callable[[], Any]) -> Any:
    """The result of a measurement, or the error that ended it."""
    try:
        return measure()
    except Exception as error:  # the others go on
        return dict(error=f'{type(error).__name__}: {str(error).splitlines()[0][:200]}')
    finally:
        torch.cuda.empty_cache()


def milliseconds(step: Callable[[], Any], repeats: int) -> float:
    """Median time of a step on the GPU, each from a cold cache.

    The GPU sleeps first, so that a short step is queued whole before it begins. The cache is filled
    by reading, because written lines would be written back while the step runs. Garbage collection
    is off: after compilers have run it takes long.
    """
    flush = torch.ones(2**26, device='cuda')
    events = []
    gc.collect()
    gc.disable()
    try:
        for repeat in range(repeats + 5):
            flush.sum()
            torch.cuda._sleep(4_000_000)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            if repeat >= 5:  # the first warm up
                events.append((start, end))
    finally:
        gc.enable()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written per second by a copy in memory."""
    source = torch.empty(2**30, dtype=torch.int8, device='cuda')
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), repeats) * 1e3


def with_gradients(attend: Callable[..., Tensor], maps: list[Tensor], cotangent: Tensor) -> list:
    """The output, and the gradients of the maps."""
    maps = [x.detach().requires_grad_() for x in maps]
    out = attend(*maps)
    return [out.detach(), *torch.autograd.grad(out, maps, cotangent.to(out.dtype))]


def parity(stage: Stage, dtype: torch.dtype) -> dict[str, list[float]]:
    """Errors of the kernels and of the reference against float64: output, dq, dk, dv."""
    maps, routes = stage.maps(4, dtype)
    cotangent = torch.randn_like(maps[0])

    def run(maps: list[Tensor], backend: str) -> list[Tensor]:
        def attend(*maps: Tensor) -> Tensor:
            return routed_attention(*maps, routes, **stage.options(), backend=backend)

        return with_gradients(attend, maps, cotangent)

    exact = run([x.double() for x in maps], 'reference')
    first, again = run(maps, 'triton'), run(maps, 'triton')
    errors = {
        name: [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        for name, found in (('triton', first), ('reference', run(maps, 'reference')))
    }
    return dict(errors, equal_in_two_runs=all(map(torch.equal, first, again)))


def ours(stage: Stage, routes: Tensor, backend: str) -> Callable[..., Tensor]:
    """One of this project's backends."""
    options = dict(stage.options(), backend=backend)
    return lambda q, k, v: routed_attention(q, k, v, routes, **options)


def gather(stage: Stage, routes: Tensor) -> Callable[..., Tensor]:
    """The published formulation, including its copies into regions."""
    options = stage.options()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, kv = (split_regions(x, stage.region) for x in (q, torch.cat([k, v], -1)))
        return gather_attention(q, kv, routes, options['num_heads'], options['scale'])

    return attend


def dense(stage: Stage, routes: Tensor) -> Callable[..., Tensor]:
    """All tokens attend to all: more work, and another result."""
    options = stage.options()

    def attend(*maps: Tensor) -> Tensor:
        heads = (x.flatten(1, 2).unflatten(-1, (options['num_heads'], -1)) for x in maps)
        q, k, v = (x.transpose(1, 2) for x in heads)
        return F.scaled_dot_product_attention(q, k, v, scale=options['scale'])

    return attend


def flex(stage: Stage, routes: Tensor) -> Callable[..., Tensor]:
    """FlexAttention on tokens sorted by region, so that it can skip whole blocks."""
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    heads, tokens = stage.options()['num_heads'], math.prod(stage.size)
    regions = routes.shape[1]
    listed = torch.zeros(len(routes), regions, regions, dtype=torch.bool, device='cuda')
    listed.scatter_(2, routes, True)
    region = region_of_token(stage.size, stage.region, routes.device).sort().values
    mask = torch.compile(create_block_mask)(
        lambda b, h, i, j: listed[b, region[i], region[j]], len(routes), None, tokens, tokens
    )
    compiled = torch.compile(flex_attention)
    config.donated_buffer = False  # the backward pass is timed repeatedly

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            split_regions(x, stage.region).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x in (q, k, v)
        )
        return compiled(q, k, v, block_mask=mask, scale=stage.options()['scale'])

    return attend


WAYS = {
    'mmbiformer (triton)': lambda stage, routes: ours(stage, routes, 'triton'),
    'mmbiformer (sdpa)': lambda stage, routes: ours(stage, routes, 'sdpa'),
    'published gather': gather,
    'dense SDPA': dense,
}


def time_attention(attend: Callable[..., Tensor], maps: list[Tensor], repeats: int) -> dict:
    """Milliseconds forward and backward, and the memory that a training pass adds."""
    maps = [x.detach().requires_grad_() for x in maps]
    with torch.no_grad():
        forward = milliseconds(lambda: attend(*maps), repeats)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    out = attend(*maps)
    cotangent = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, maps, cotangent, retain_graph=True)

    backward()
    peak = torch.cuda.max_memory_allocated() - base
    return dict(forward_ms=forward, backward_ms=milliseconds(backward, repeats), peak_bytes=peak)


def measure_stage(stage: Stage, batch: int, bandwidth: float, repeats: int) -> dict[str, Any]:
    """All candidates for a stage's attention in bfloat16, and the least time memory allows."""
    maps, routes = stage.maps(batch, torch.bfloat16)
    moved = maps[0].numel() * maps[0].element_size()
    # Forward reads q, k, v and writes the output. Backward reads these four and the gradient of the
    # output, and writes three gradients.
    rows = dict(floor=dict(forward_ms=4e3 * moved / bandwidth, backward_ms=8e3 * moved / bandwidth))
    for name, way in WAYS.items():
        rows[name] = attempt(lambda way=way: time_attention(way(stage, routes), maps, repeats))
    name = 'mmbiformer (triton)'
    torch.use_deterministic_algorithms(True)
    rows[f'{name}, deterministic mode'] = attempt(
        lambda: time_attention(WAYS[name](stage, routes), maps, repeats)
    )
    torch.use_deterministic_algorithms(False)
    return rows


def measure_flex(stage: Stage, batch: int, repeats: int) -> dict[str, float]:
    """FlexAttention for a stage's attention; compiling it first can take minutes."""
    maps, routes = stage.maps(batch, torch.bfloat16)
    return time_attention(flex(stage, routes), maps, repeats)


def make_network(name: str) -> nn.Module:
    """A network by name, without its classifier, channels last."""
    if name in ('mmbiformer', 'published gather'):
        net = BiFormer('small', final_norm=True)
        net = gather_baseline(net) if name == 'published gather' else net
    else:
        import timm

        net = timm.create_model(name, num_classes=0)
    return net.cuda().to(memory_format=torch.channels_last)


BLOCKS = 'Block', 'SwinTransformerBlock', 'ConvNeXtBlock'


def compile_blocks(net: nn.Module) -> None:
    """Compile each block; the blocks of a stage are alike, so this saves most of the time."""
    torch._dynamo.config.cache_size_limit = 64  # kinds of blocks, in training and inference
    for module in net.modules():
        if type(module).__name__ in BLOCKS:
            module.compile(dynamic=False)


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """A step as a CUDA graph: all its kernels are launched at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # what the first call on a stream sets up cannot be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def time_network(name: str, batch: int, repeats: int, compiled: bool = False) -> dict[str, float]:
    """Images per second.

    Timed are training under autocast without an optimizer, inference under autocast, and inference
    with bfloat16 weights; the first and the last also as CUDA graphs.
    """
    net = make_network(name).train()
    if compiled:
        compile_blocks(net)
    torch.cuda.reset_peak_memory_stats()
    x = torch.randn(batch, 3, 224, 224, device='cuda').to(memory_format=torch.channels_last)

    def forward() -> Tensor:
        with torch.autocast('cuda', torch.bfloat16):
            out = net(x)
        return out[0] if isinstance(out, tuple) else out

    def training_step() -> None:
        net.zero_grad(set_to_none=True)
        forward().float().square().mean().backward()

    times = dict(training=milliseconds(training_step, repeats))
    peak = torch.cuda.max_memory_allocated()
    if not compiled:
        times['training_graph'] = milliseconds(captured(training_step), repeats)
    net.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    net.eval()
    with torch.inference_mode():
        times['inference'] = milliseconds(forward, repeats)
    if not compiled:
        net.bfloat16()
        x = x.bfloat16()
        with torch.inference_mode():
            times['inference_bf16'] = milliseconds(lambda: net(x), repeats)
            times['inference_graph'] = milliseconds(captured(lambda: net(x)), repeats)
    speeds = {f'{key}_images_per_s': 1e3 * batch / value for key, value in times.items()}
    return dict(speeds, training_peak_bytes=peak)


NETWORKS = 'mmbiformer', 'convnext_base', 'swin_base_patch4_window7_224', 'published gather'


def measure_networks(
    record: dict[str, Any], args: argparse.Namespace, mode: str, names: Sequence[str]
) -> None:
    """Time networks plain, compiled or in deterministic mode; add a row for each."""
    for name in names:
        title = name if mode == 'plain' else f'{name}, {mode}'
        progress(title)
        torch.use_deterministic_algorithms(mode == 'deterministic', warn_only=True)
        record['networks'][title] = attempt(
            lambda name=name: time_network(name, args.batch, args.repeats, mode == 'compiled')
        )
        torch.use_deterministic_algorithms(False)
        keep(record, args.out)


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print a table; a row that failed shows its error."""
    columns = next(([*row] for row in rows.values() if 'error' not in row), [])
    print(f'\n{title:44}' + ''.join(f'{column:>{WIDTH}}' for column in columns))
    for name, row in rows.items():
        cells = ''.join(f'{row[c]:>{WIDTH}.4g}' if c in row else ' ' * WIDTH for c in columns)
        print(f'{name:44}' + (f'  {row["error"]}' if 'error' in row else cells))


def show_parity(rows: dict[str, dict[str, Any]]) -> None:
    """Print the errors beside those of the reference in the same precision."""
    print(f'\n{"errors against float64, out dq dk dv":44}')
    for name, row in rows.items():
        if 'error' in row:
            print(f'{name:44}  {row["error"]}')
            continue
        pairs = zip(row['triton'], row['reference'], strict=True)
        ratios = [a / max(b, torch.finfo(torch.float64).eps) for a, b in pairs]
        verdict = 'ok' if max(ratios) <= 2 and row['equal_in_two_runs'] else 'BEYOND THE BUDGET'
        errors = ' '.join(f'{error:.1e}' for error in row['triton'])
        ratios = ' '.join(f'{ratio:.2f}' for ratio in ratios)
        print(f"{name:44}  {errors}  of the reference's: {ratios}  {verdict}")


def main() -> None:
    """Measure, print tables, write JSON."""
    args = parse_args()
    if not torch.cuda.is_available():
        raise UserError(
            'this benchmark needs a CUDA GPU, and PyTorch finds none here; on CPU run  make bench'
        )
    torch.manual_seed(0)
    # cuBLAS refuses deterministic mode without this setting.
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    record: dict[str, Any] = dict(batch=args.batch, environment=environment())
    print(
        f'{record["environment"]["gpu"]}, batch {args.batch}, bfloat16, medians of {args.repeats}'
    )
    record['copy_bytes_per_s'] = bandwidth = copy_bandwidth(args.repeats)
    print(f'\ncopying moves {bandwidth / 1e12:.2f} TB/s')
    record['parity'] = {}
    for name, stage in (STAGES | AWKWARD).items():
        for dtype in DTYPES:
            title = f'{name}, {str(dtype).removeprefix("torch.")}'
            progress(title)
            record['parity'][title] = attempt(lambda stage=stage, dtype=dtype: parity(stage, dtype))
    show_parity(record['parity'])
    keep(record, args.out)
    record['networks'] = {}
    measure_networks(record, args, 'plain', NETWORKS)
    measure_networks(record, args, 'deterministic', NETWORKS[:1])
    show('network at 224x224', record['networks'])
    record['attention'] = {}
    for name, stage in STAGES.items():
        progress(f'attention, {name}')
        rows = attempt(
            lambda stage=stage: measure_stage(stage, args.batch, bandwidth, args.repeats)
        )
        record['attention'][name] = rows
        show(f'attention, {name}', rows if 'error' not in rows else {name: rows})
        keep(record, args.out)
    if args.compile:
        measure_networks(record, args, 'compiled', NETWORKS)
        show('network at 224x224', record['networks'])
    for name, stage in STAGES.items():
        progress(f'FlexAttention, {name}')
        row = attempt(lambda stage=stage: measure_flex(stage, args.batch, args.repeats))
        record['attention'][name]['FlexAttention'] = row
        show(f'attention, {name}', record['attention'][name])
        keep(record, args.out)
    if args.out:
        print(f'\nwrote {args.out}')


def keep(record: dict[str, Any], path: Path | None) -> None:
    """Write all results so far: time on a GPU can end at any moment."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + '\n')


def environment() -> dict[str, str]:
    """Hardware, versions and date."""
    versions = {'torch': torch.__version__, 'cuda': torch.version.cuda, 'mmbiformer': __version__}
    for package in ('triton', 'timm'):
        versions[package] = attempt(lambda package=package: version(package))
    return dict(
        versions,
        gpu=torch.cuda.get_device_name(),
        python=platform.python_version(),
        date=time.strftime('%Y-%m-%d'),
    )


if __name__ == '__main__':
    run_command(main)
