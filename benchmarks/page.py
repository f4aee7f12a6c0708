"""Parts that the sections of docs/speed.md share."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
Results = dict[str, dict[str, Any]]

FILES = dict(
    biformer='cpu.json',
    biformer_kept='cpu_kept.json',
    debiformer='cpu_debiformer.json',
    coco='cpu_coco.json',
    rivals='cpu_rivals.json',
    half='cpu_half.json',
    grids='cpu_grids.json',
    deterministic='cpu_deterministic.json',
    compile='cpu_compile.json',
    export='cpu_export.json',
    bixt_s8='cpu_bixt_s8.json',
    bixt_s4='cpu_bixt_s4.json',
    bixt_rivals='cpu_bixt_rivals.json',
    bixt_tokens='cpu_bixt_tokens.json',
    gpu='gpu.json',
)

# Image size of results that do not say it.
SIZE = [224, 224]


def table(*rows: list[str]) -> str:
    """A Markdown table whose first row is the head."""
    rule = ['---'] * len(rows[0])
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (rows[0], rule, *rows[1:]))


def seconds(value: float) -> str:
    """Seconds with three digits and the unit."""
    return f'{value:#.3g}'.rstrip('.') + ' s'


def by(size: list[int]) -> str:
    """A size as text, such as 224x224."""
    return 'x'.join(map(str, size))


def facts(name: str, results: Results) -> str:
    """How a table was measured, and the command that repeats it."""
    record = results[name]
    repeats = record.get('repeats')
    timed = f'median of {repeats}, ' if repeats and repeats > 1 else ''
    timed = 'timed once after a warm-up, ' if repeats == 1 else timed
    module, command = record.get('module', 'benchmarks.cpu'), record.get('model', name)
    settings = ''.join(f'{key}={value} ' for key, value in record.get('malloc', {}).items())
    return (
        f'{timed}{record["threads"]} threads on {record["processor"]}, torch {record["torch"]}, '
        f'mmbiformer {record["mmbiformer"]}, {record["date"]}: '
        f'[{FILES[name]}](../benchmarks/results/{FILES[name]}), '
        f'`{settings}python -m {module} {command} '
        f'--out benchmarks/results/{FILES[name]}`'
    )


def save(figure: plt.Figure, path: Path) -> None:
    """Save a plot; the same numbers give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for axes in figure.axes:
        axes.spines[['top', 'right']].set_visible(False)
    with plt.rc_context({'svg.hashsalt': 'mmbiformer', 'svg.fonttype': 'none'}):
        figure.savefig(path, bbox_inches='tight', metadata={'Date': None})
    plt.close(figure)
