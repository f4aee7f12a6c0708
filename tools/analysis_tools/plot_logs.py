"""Draw what trainings logged: losses beside metrics, one line a run.

Examples:
    python tools/analysis_tools/plot_logs.py work_dirs/maskrcnn_biformer_s_coco --out curves.png
    python tools/analysis_tools/plot_logs.py work_dirs/a work_dirs/b --keys lr --out lr.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mmbiformer.engine.checks import CommandError, check_writable
from mmbiformer.engine.command_line import run_command
from mmbiformer.engine.files import write_figure

HEADLINES = ('mAP', 'mIoU', 'top1')
"""How the metrics end that are drawn unless others are asked for."""

BOOKKEEPING = {'lr', 'base_lr', 'data_time', 'time', 'epoch', 'iter', 'step', 'memory'}
"""What MMEngine logs of every training besides its losses."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'runs', nargs='+', type=Path, help='work folders (their latest run) or scalars.json files'
    )
    parser.add_argument(
        '--keys', nargs='+', help='what to draw (default: the total loss and mAP, mIoU or top-1)'
    )
    parser.add_argument('--out', type=Path, default=Path('curves.png'), help='picture to write')
    return parser.parse_args()


def read_run(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each number that a run logged.

    Args:
        path: A ``scalars.json``, or a work folder, of which the latest run is taken.

    Raises:
        CommandError: If there is none.
    """
    if path.is_dir():
        logs = sorted(path.glob('*/vis_data/scalars.json'))
        if not logs:
            raise CommandError(f'{path}: there is no run in it (*/vis_data/scalars.json)')
        path = logs[-1]
    if not path.is_file():
        raise CommandError(f'there is no file or folder {path}')
    curves: dict[str, tuple[list[float], list[float]]] = {}
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise CommandError(
            f'{path} is no text; give a work folder or a scalars.json of MMEngine'
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line).items()
            numbers = {key: float(x) for key, x in record if isinstance(x, (int, float))}
            step = numbers['step']
        except (ArithmeticError, AttributeError, LookupError, RecursionError, ValueError) as error:
            raise CommandError(f'{path}, line {number}: not a record of MMEngine') from error
        for key, value in numbers.items():
            steps, values = curves.setdefault(key, ([], []))
            steps.append(step)
            values.append(value)
    if not curves:
        raise CommandError(f'{path} is empty: nothing was logged yet, or the disk was full')
    return curves


def check_out(path: Path) -> None:
    """Raise CommandError unless a picture of this name can be written."""
    if path.is_dir():
        raise CommandError(f'--out {path} is a folder; give FOLDER/NAME.png')
    endings = [f'.{name}' for name in sorted(FigureCanvasAgg.get_supported_filetypes())]
    if path.suffix.lower() not in endings:
        raise CommandError(f'--out {path}: the file must end in one of {", ".join(endings)}')
    check_writable(str(path.parent), '--out')


def main() -> None:
    """Read, choose, draw."""
    args = parse_args()
    check_out(args.out)
    runs = {run: read_run(run) for run in args.runs}
    logged = dict.fromkeys(key for curves in runs.values() for key in curves)
    if args.keys is None:
        keys = [key for key in logged if key == 'loss' or key.endswith(HEADLINES)]
    else:
        keys = args.keys
        if unknown := [key for key in keys if key not in logged]:
            raise CommandError(f'{", ".join(unknown)}: not logged; there are {", ".join(logged)}')
    if not keys:
        raise CommandError(f'nothing to draw; logged are {", ".join(logged)}')
    left = [key for key in keys if not is_metric(key)]
    right = [key for key in keys if is_metric(key)]
    panels = [part for part in (left, right) if part]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False, layout='constrained'
    )
    alike = len({run.name for run in runs}) < len(runs)
    names = {run: str(run) if alike else run.name for run in runs}
    for axis, part in zip(axes[0], panels, strict=True):
        for run, curves in runs.items():
            for key in part:
                if key in curves:
                    label = key if len(runs) == 1 else f'{names[run]} {key}'
                    steps, values = curves[key]
                    dotted = part is right or len(steps) == 1  # a line needs two points
                    axis.plot(steps, values, '.-' if dotted else '-', label=label)
        axis.set(xlabel='epoch or iteration' if part is right else 'iteration')
        axis.legend(frameon=False, fontsize='small')
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    write_figure(args.out, figure, dpi=120)
    print(f'drew {len(keys)} curve(s) of {len(runs)} run(s): {args.out}')


def is_metric(key: str) -> bool:
    """Whether a number is of validation, not of training."""
    return not (key in BOOKKEEPING or 'loss' in key or key.endswith('acc') or key == 'grad_norm')


if __name__ == '__main__':
    run_command(main)
