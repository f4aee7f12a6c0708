"""Write docs/speed.md and its plots from the results of the benchmarks, as far as there are any.

Example:
    python -m benchmarks.plot
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.bixt_page import bixt_section
from benchmarks.page import FILES, ROOT, SIZE, Results, by, facts, save, seconds, table
from mmbiformer.commands.faults import run_command
from mmbiformer.errors import UserError

MODELS = dict(
    biformer='BiFormer-S',
    biformer_kept='BiFormer-S, memory kept',
    debiformer='DeBiFormer-S',
    coco='BiFormer-S, 16x16 grid',
)
KEPT = """
The published formulation spends much of its time in the system: glibc gives the memory of large
tensors back and must get every page again. "Memory kept" was measured with the settings `MALLOC_…`
below, under which glibc keeps the memory. The difference that remains is arithmetic and copies.
"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--results', type=Path, default=ROOT / 'benchmarks/results')
    parser.add_argument('--out', type=Path, default=ROOT / 'docs', help='folder of the page')
    return parser.parse_args()


def read_results(folder: Path) -> Results:
    """Read the records that exist, by command.

    Args:
        folder: Where the benchmarks have written them.

    Raises:
        UserError: If there are none, or one is not JSON or was written with --quick.
    """
    results = {}
    for name, file in FILES.items():
        path = folder / file
        if not path.is_file():
            continue
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f'{path} is not JSON: {error}; measure again') from error
        if record.get('quick'):
            raise UserError(f'{path} was written with --quick and measures nothing; remove it')
        results[name] = record
    if not results:
        raise UserError(f'{folder} has no results; measure some with  make bench')
    return results


def against_published(results: Results) -> list[tuple[str, str, str, float]]:
    """Rows of: what is measured, theirs and ours as text, and how many times less ours is."""
    rows = []
    for name, model in MODELS.items():
        record = results.get(name)
        if record is None:
            continue
        sizes = {'forward': record.get('size', SIZE), 'training step': record.get('train_size')}
        for row, pair in record['seconds'].items():
            what = f'{model}, {record["batch"]} x {by(sizes[row] or SIZE)}, {row}'
            ratio = pair['published'] / pair['ours']
            rows.append((what, seconds(pair['published']), seconds(pair['ours']), ratio))
        peaks = record.get('peak_bytes_training', {})
        if len(peaks) == 2:
            sizes = record.get('train_size', SIZE)
            what = f'{model}, {record["batch"]} x {by(sizes)}, memory of a training step'
            texts = (f'{peaks[key] / 2**30:.2f} GiB' for key in ('published', 'ours'))
            rows.append((what, *texts, peaks['published'] / peaks['ours']))
    return rows


def published_section(results: Results, folder: Path) -> str:
    """The section on the published formulations."""
    rows = against_published(results)
    if not rows:
        return ''
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.4 * len(rows)))
    ratios = [row[3] for row in rows]
    bars = axes.barh([row[0] for row in rows], ratios, color='#2a6f97')
    axes.bar_label(bars, [f' {ratio:.1f}x' for ratio in ratios])
    axes.axvline(1, color='black', lw=1, ls='--')
    axes.set(xlabel='times less than the published formulation', xlim=(0, 1.15 * max(ratios)))
    axes.invert_yaxis()
    save(figure, folder / 'published.svg')
    body = table(
        ['', 'published formulation', 'mmbiformer', 'times less'],
        *([what, theirs, ours, f'{ratio:.1f}x'] for what, theirs, ours, ratio in rows),
    )
    notes = '\n'.join(
        f'- {MODELS[name]}: {facts(name, results)}; the outputs differ by at most '
        f'{results[name]["difference"]:.0e} of the largest.'
        for name in MODELS
        if name in results
    )
    kept = KEPT if 'biformer_kept' in results else ''
    return f"""## Against the published formulations

[gather_baseline.py](../benchmarks/gather_baseline.py) re-expresses how the authors compute the same
outputs with the same weights: keys and values are gathered from maps that are expanded to every
region, and copies turn maps into regions and back. All is float32. Rounding can then decide a
near-tie between two routes; in float64 the outputs are equal (`tests/benchmarks/test_cpu.py`).
{kept}
![Times less than the published formulation](speed/published.svg)

{body}

{notes}
"""


def rivals_section(results: Results, folder: Path) -> str:
    """The section on timm's models of the same size."""
    record = results.get('rivals')
    if record is None or 'forward' not in record['seconds']:
        return ''
    speed = {name: record['batch'] / s for name, s in record['seconds']['forward'].items()}
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.4 * len(speed)))
    bars = axes.barh([*speed], [*speed.values()], color='#2a6f97')
    axes.bar_label(bars, [f' {value:.1f}' for value in speed.values()])
    axes.set(xlabel='images of 224x224 per second, forward', xlim=(0, 1.15 * max(speed.values())))
    axes.invert_yaxis()
    save(figure, folder / 'rivals.svg')
    ours = next(iter(speed.values()))
    body = table(
        ['', 'images per second', 'BiFormer-S beside it'],
        *([name, f'{value:.1f}', f'{ours / value:.2f}x'] for name, value in speed.items()),
    )
    return f"""## Beside other backbones

Forward without the classifier, float32, batch {record['batch']}, channels last. The others are from
timm {record['timm']}.

![Images per second](speed/rivals.svg)

{body}

{facts('rivals', results)}
"""


def half_section(results: Results, folder: Path) -> str:
    """bfloat16 on a CPU, beside float32 and ConvNeXt-S."""
    record = results.get('half')
    if record is None:
        return ''
    names = dict(fused='fused attention', sdpa="PyTorch's attention")
    rows = []
    for step, times in record['seconds'].items():
        for name, value in times.items():
            kind, _, how = name.partition(', ')
            how = how or 'bfloat16 weights'
            rows.append([step, names.get(kind, kind), how, seconds(value)])
    return f"""## In bfloat16

BiFormer-S, {record['batch']} images of {record['size'][0]}x{record['size'][1]}, with the fused
attention and with PyTorch's, beside ConvNeXt-S of timm {record['timm']}.

{table(['', '', '', 'time'], *rows)}

{facts('half', results)}
"""


def grids_section(results: Results, folder: Path) -> str:
    """The section on large images."""
    record = results.get('grids')
    if record is None or not record['seconds']:
        return ''
    rows = record['seconds']
    names = [*next(iter(rows.values()))]

    def per_megapixel(size: str, name: str) -> float | None:
        height, width = map(int, size.split('x'))
        taken = rows[size].get(name)
        return None if taken is None else taken / (height * width / 1e6)

    figure, axes = plt.subplots(figsize=(8, 4))
    for name in names:
        points = [(int(size.split('x')[0]), per_megapixel(size, name)) for size in rows]
        points = [point for point in points if point[1] is not None]
        axes.plot(*zip(*points, strict=True), marker='o', label=name)
    sides = [int(size.split('x')[0]) for size in rows]
    axes.set(xscale='log', xlabel='side of the image, pixels')
    axes.set_yscale('log', base=2)
    axes.set_ylabel('seconds per megapixel')
    axes.set_xticks(sides, map(str, sides))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter('{x:g}')
    axes.legend(title='region_grid')
    save(figure, folder / 'grids.svg')
    first, last = next(iter(rows)), [*rows][-1]
    growth = []
    for name in names:
        ends = per_megapixel(first, name), per_megapixel(last, name)
        growth.append('' if None in ends or first == last else f'{ends[1] / ends[0]:.2f}x')

    def cell(size: str, name: str) -> str:
        value = per_megapixel(size, name)
        return 'not run' if value is None else seconds(value)

    body = table(
        ['seconds per megapixel', *names],
        *([size, *(cell(size, name) for name in names)] for size in rows),
        [f'{last} against {first}', *growth],
    )
    return f"""## Large images

BiFormer-S, one image, forward, float32. With a fixed grid the regions grow with the image, and
attention becomes quadratic again. `region_grid='auto'` lets their number grow instead, with the
cube root of the image's area (`mmbiformer.ops.auto_grid`); at 224x224 it is 7x7. "Dense" means that
all tokens attend to all in every stage. The last stage is dense in every column. The settings
`MALLOC_…` below keep memory between steps; without them large images are slower with any grid.

![Seconds per megapixel](speed/grids.svg)

{body}

{facts('grids', results)}
"""


def settings_section(results: Results, folder: Path) -> str:
    """The section on PyTorch's own switches."""
    body = []
    for name in ('deterministic', 'compile'):
        for row, times in results.get(name, {}).get('seconds', {}).items():
            plain, other = times
            compiling = results[name].get('compile_seconds', {}).get(row)
            what = f'{other}, {row}' + (f' (first call: {compiling:.0f} s)' if compiling else '')
            ratio = times[plain] / times[other]
            body.append([what, seconds(times[plain]), seconds(times[other]), f'{ratio:.2f}x'])
    if not body:
        return ''
    notes = '\n'.join(
        f'- {name}: {facts(name, results)}'
        for name in ('deterministic', 'compile')
        if name in results
    )
    return f"""## Deterministic, compiled

BiFormer-S at 224x224 with `torch.use_deterministic_algorithms(True)` and with `torch.compile`.

{table(['', 'without', 'with', 'speed-up'], *body)}

{notes}
"""


def export_section(results: Results, folder: Path) -> str:
    """The section on exported files."""
    record = results.get('export')
    if record is None:
        return ''
    rows = [[row, *map(seconds, times.values())] for row, times in record['seconds'].items()]
    first, *others = next(iter(record['seconds'].values()))
    made = ['made in', '', *(f'{record["export_seconds"][name]:.0f} s' for name in others)]
    return f"""## Exported

Forward pass of BiFormer-S's backbone for images of {by(record['size'])}, as files that run without
this project ([deployment.md](deployment.md)).

{table(['images', f'PyTorch, {first}', *others], *rows, made)}

ONNX Runtime {record['onnxruntime']}; {facts('export', results)}
"""


def gpu_section(results: Results, folder: Path) -> str:
    """The section on the fused kernels, and networks, on a GPU."""
    record = results.get('gpu')
    if record is None:
        return ''
    stages = {name: rows for name, rows in record.get('attention', {}).items() if 'floor' in rows}
    ways = list(dict.fromkeys(way for rows in stages.values() for way in rows))
    figure, panels = plt.subplots(
        1, max(1, len(stages)), figsize=(11, 3), sharex=True, sharey=True, squeeze=False
    )
    body = []
    for axes, (stage, rows) in zip(panels[0], stages.items(), strict=False):
        rows = {way: rows[way] for way in ways if 'error' not in rows.get(way, {'error': ''})}
        for shift, (key, color) in enumerate((('forward', '#2a6f97'), ('backward', '#a9d6e5'))):
            values = [1e3 * row[f'{key}_ms'] for row in rows.values()]
            places = [ways.index(way) + 0.4 * shift - 0.2 for way in rows]
            axes.barh(places, values, 0.4, label=key, color=color)
        axes.set(xscale='log', xlim=(8, None), xlabel='µs', title=stage)
        for way, row in rows.items():
            cells = []
            for key in ('forward_ms', 'backward_ms'):
                floor = rows['floor'][key] / row[key]
                cells += [f'{1e3 * row[key]:.0f} µs', f'{100 * floor:.0f} %']
            body.append([stage, way, *cells])
    panels[0][0].set_yticks(range(len(ways)), ways)
    panels[0][0].invert_yaxis()
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc='center left', bbox_to_anchor=(0.91, 0.5)
    )
    save(figure, folder / 'gpu.svg')
    head = ['', '', 'forward', 'floor / time', 'backward', 'floor / time']
    networks = []
    for name, row in record.get('networks', {}).items():
        if 'error' not in row:
            speeds = [f'{row[f"{key}_images_per_s"]:.0f}' for key in GPU_SPEEDS]
            networks.append([name, *speeds, f'{row["training_peak_bytes"] / 2**30:.1f} GiB'])
    checks = [row for row in record['parity'].values() if 'error' not in row]
    held = sum(within_budget(row) for row in checks)
    known = record['environment']
    notes = ''.join(f'- {note}.\n' for note in record.get('notes', []))
    return f"""## On a GPU

Attention of BiFormer-S at 224x224, batch {record['batch']}, bfloat16, from a cold cache. The floor
is the time that memory traffic alone would take: each map is read or written once at the speed of a
copy, {record['copy_bytes_per_s'] / 1e12:.2f} TB/s.

![Time of attention](speed/gpu.svg)

{table(head, *body)}

Images per second of networks at 224x224. Training (without an optimizer) and inference run under
autocast to bfloat16; two columns have bfloat16 weights. As CUDA graphs they do not wait for the
processor.

{table(['', *GPU_SPEEDS.values(), 'memory of training'], *networks)}

Output and gradients were compared with float64 in {len(record['parity'])} cases of shape and
precision. In {held} of them the error was at most twice the reference's in that precision, and two
runs were equal bit by bit.

{notes}
{known['gpu']}, torch {known['torch']}, Triton {known['triton']}, timm {known['timm']}, mmbiformer
{known['mmbiformer']}, {known['date']}: [{FILES['gpu']}](../benchmarks/results/{FILES['gpu']}),
`python -m benchmarks.gpu --out benchmarks/results/{FILES['gpu']}`. More: [gpu.md](gpu.md).
"""


GPU_SPEEDS = dict(
    training='training',
    training_graph='training as a graph',
    inference='inference',
    inference_bf16='bfloat16 weights',
    inference_graph='these as a graph',
)


def within_budget(row: dict[str, Any]) -> bool:
    """Whether errors are at most twice the reference's, and two runs are equal."""
    pairs = zip(row['triton'], row['reference'], strict=True)
    return row['equal_in_two_runs'] and all(found <= 2 * plain for found, plain in pairs)


SECTIONS = (
    published_section,
    rivals_section,
    half_section,
    grids_section,
    settings_section,
    export_section,
    bixt_section,
    gpu_section,
)


def write_page(results: Results, out: Path) -> str:
    """Write the page and its plots.

    Args:
        results: From :func:`read_results`.
        out: Folder for ``speed.md`` and ``speed/``.

    Returns:
        str: The page.
    """
    sections = [section(results, out / 'speed') for section in SECTIONS]
    head = """# Speed

All but the last section was measured on CPU. The candidates of a ratio took turns in one run.
`make bench` measures on CPU what takes minutes, `make bench-long` the rest. Both write this page
again from the JSON files (`python -m benchmarks.plot`).
"""
    page = '\n'.join([head, *filter(None, sections)])
    out.mkdir(parents=True, exist_ok=True)
    (out / 'speed.md').write_text(page)
    return page


def main() -> None:
    """Read, draw, write."""
    args = parse_args()
    results = read_results(args.results)
    write_page(results, args.out)
    print(f'wrote {args.out / "speed.md"} from {", ".join(FILES[name] for name in results)}')


if __name__ == '__main__':
    run_command(main)
