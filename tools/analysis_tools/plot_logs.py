"""Draw what trainings logged: losses beside metrics, one line a run.

Examples:
    python tools/analysis_tools/plot_logs.py work_dirs/maskrcnn_biformer_s_coco
    python tools/analysis_tools/plot_logs.py work_dirs/a work_dirs/b --keys lr --out lr.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mmbiformer.commands.faults import run_command
from mmbiformer.errors import UserError
from mmbiformer.files import write_figure

HEADLINES = ('mAP', 'mIoU', 'top1')
"""Endings of the metrics that are drawn by default."""

BOOKKEEPING = {'lr', 'base_lr', 'data_time', 'time', 'epoch', 'iter', 'step', 'memory'}
"""Numbers that MMEngine logs in every training besides its losses."""

Curves = dict[str, tuple[list[float], list[float]]]
"""Steps and values by key."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'runs', nargs='+', type=Path, help='work folders (their latest run) or scalars.json files'
    )
    parser.add_argument(
        '--keys', nargs='+', help='what to draw (default: the total loss and mAP, mIoU or top-1)'
    )
    parser.add_argument(
        '--out', type=Path, help='picture to write (default: curves.png beside the first run)'
    )
    return parser.parse_args()


def read_run(path: Path) -> Curves:
    """Read what a run logged.

    Args:
        path: A ``scalars.json``, or a work folder; its latest run is read.

    Raises:
        UserError: If there is none, or nothing in it.
    """
    if path.is_dir():
        logs = sorted(path.glob('*/vis_data/scalars.json'))
        if not logs:
            raise UserError(f'{path}: there is no run in it (*/vis_data/scalars.json)')
        path = logs[-1]
    if not path.is_file():
        raise UserError(f'there is no file or folder {path}')
    curves: Curves = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        for key, value in record.items():
            if isinstance(value, (int, float)):
                steps, values = curves.setdefault(key, ([], []))
                steps.append(record['step'])
                values.append(value)
    if not curves:
        raise UserError(f'{path} is empty: nothing was logged yet')
    return curves


def is_metric(key: str) -> bool:
    """Whether a number is of validation, not of training."""
    return not (key in BOOKKEEPING or 'loss' in key or key.endswith('acc') or key == 'grad_norm')


def draw(runs: dict[str, Curves], keys: list[str]) -> plt.Figure:
    """Draw numbers of training on the left, metrics on the right.

    Args:
        runs: Curves by name.
        keys: Which curves to draw.
    """
    parts = [[key for key in keys if is_metric(key) == right] for right in (False, True)]
    parts = [part for part in parts if part]
    figure, axes = plt.subplots(
        1, len(parts), figsize=(5 * len(parts), 3.6), squeeze=False, layout='constrained'
    )
    for axis, part in zip(axes[0], parts, strict=True):
        for name, curves in runs.items():
            for key in filter(curves.get, part):
                steps, values = curves[key]
                dotted = is_metric(key) or len(steps) == 1  # a line needs two points
                label = key if len(runs) == 1 else f'{name} {key}'
                axis.plot(steps, values, '.-' if dotted else '-', label=label)
        axis.set(xlabel='epoch or iteration' if is_metric(part[0]) else 'iteration')
        axis.legend(frameon=False, fontsize='small')
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    return figure


def main() -> None:
    """Read, choose, draw."""
    args = parse_args()
    first = args.runs[0]
    out = args.out or (first if first.is_dir() else first.parent) / 'curves.png'
    endings = [f'.{name}' for name in FigureCanvasAgg.get_supported_filetypes()]
    if out.suffix.lower() not in endings:
        raise UserError(f'--out {out}: the name must end in one of {", ".join(sorted(endings))}')
    alike = len({run.name for run in args.runs}) < len(args.runs)
    runs = {str(run) if alike else run.name: read_run(run) for run in args.runs}
    logged = dict.fromkeys(key for curves in runs.values() for key in curves)
    keys = args.keys or [key for key in logged if key == 'loss' or key.endswith(HEADLINES)]
    if unknown := [key for key in keys if key not in logged]:
        raise UserError(f'{", ".join(unknown)}: not logged; there are {", ".join(logged)}')
    if not keys:
        raise UserError(f'nothing to draw by default; choose --keys from {", ".join(logged)}')
    write_figure(out, draw(runs, keys), dpi=120)
    print(f'drew {len(keys)} curve(s) of {len(runs)} run(s): {out}')


if __name__ == '__main__':
    run_command(main)
