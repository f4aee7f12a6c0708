"""Time a config's model and measure its memory: prediction and training step, on random images.

Prediction is all the host does for a batch, post-processing included; a training step is losses,
gradients and the optimizer. The data pipeline is left out. Weights are random unless a checkpoint
is given, which changes what there is to post-process.

Examples:
    python tools/analysis_tools/benchmark.py configs/biformer_s_in1k.py --batch-size 64 --amp fp16
    python tools/analysis_tools/benchmark.py configs/maskrcnn_biformer_s_coco.py --shape 800 1280
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.runner import load_state_dict
from rich.progress import track

from mmbiformer.commands.fake_data import fake_batch
from mmbiformer.commands.faults import run_command
from mmbiformer.commands.options import add_config_options, image_size, read_config
from mmbiformer.commands.runner import build_model
from mmbiformer.errors import UserError
from mmbiformer.weights.fit import check_fit, load_whole_model

DTYPES = dict(fp16=torch.float16, bf16=torch.bfloat16)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_options(parser)
    parser.add_argument('--checkpoint', help='checkpoint file (default: random weights)')
    parser.add_argument('--shape', type=int, nargs='+', metavar='N', help='height and width')
    parser.add_argument('--batch-size', type=int, default=1, help='images a batch (default: 1)')
    parser.add_argument('--amp', choices=DTYPES, help='mixed precision (default: float32)')
    parser.add_argument('--repeats', type=int, default=10, help='batches timed (default: 10)')
    parser.add_argument('--warm-up', type=int, default=3, help='batches before them (default: 3)')
    parser.add_argument('--no-training', action='store_true', help='time prediction only')
    args = parser.parse_args()
    if min(args.batch_size, args.repeats) < 1 or args.warm_up < 0:
        parser.error('--batch-size and --repeats must be at least 1, --warm-up at least 0')
    return args


def measure(
    name: str, step: Callable[[], object], args: argparse.Namespace, device: str
) -> tuple[float, float]:
    """Median seconds of a step, and the peak of memory in GiB so far (CPU) or of it (GPU)."""
    times = []
    on_gpu = device.startswith('cuda')
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in track(range(args.warm_up + args.repeats), name, transient=True):
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return statistics.median(times[args.warm_up :]), peak / 2**30


def main() -> None:
    """Build, time, print."""
    args = parse_args()
    cfg = read_config(args)
    size = image_size(cfg, args.shape)
    device = get_device()
    if args.amp == 'fp16' and device == 'cpu':
        raise UserError('--amp fp16 needs a GPU; use --amp bf16, or leave it out')
    model = build_model(cfg)
    if device == 'cpu':
        model = revert_sync_batchnorm(model)
    if args.checkpoint is not None:
        checkpoint = load_whole_model(args.checkpoint)
        check_fit(model, checkpoint, args.checkpoint)
        load_state_dict(model, checkpoint['state_dict'])
    model.to(device)
    cfg.optim_wrapper.type = 'OptimWrapper'  # autocast is ours, below
    for key in ('loss_scale', 'dtype'):
        cfg.optim_wrapper.pop(key, None)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = fake_batch(cfg, args.batch_size, size)
    precision = torch.autocast(
        device.split(':')[0], DTYPES.get(args.amp), enabled=args.amp is not None
    )

    def predict() -> None:
        with torch.no_grad(), precision:
            model.test_step(batch)

    def train() -> None:
        data = model.data_preprocessor(batch, training=True)
        with precision:
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        optimizer.update_params(loss)

    steps = {'prediction': (model.eval, predict), 'training step': (model.train, train)}
    if args.no_training:
        del steps['training step']
    where = (
        torch.cuda.get_device_name()
        if device.startswith('cuda')
        else (f'CPU, {torch.get_num_threads()} threads')
    )
    rows = []
    for name, (prepare, step) in steps.items():
        prepare()
        rows.append((name, *measure(name, step, args, device)))
    print(
        f'{Path(args.config).stem}: {args.batch_size} image(s) of {size[0]}x{size[1]}, '
        f'{args.amp or "float32"}, {where}, torch {torch.__version__}, '
        f'median of {args.repeats}'
    )
    memory = 'peak memory' if device.startswith('cuda') else 'peak, process'
    print(f'{"":16}{"seconds":>12}{"images/s":>12}{memory:>18}')
    for name, seconds, peak in rows:
        print(f'{name:16}{seconds:>12.4f}{args.batch_size / seconds:>12.2f}{peak:>14.2f} GiB')


if __name__ == '__main__':
    run_command(main)
