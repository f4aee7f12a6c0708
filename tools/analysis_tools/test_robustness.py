"""Evaluate a checkpoint under corruptions: ImageNet-C, or COCO-C's for any config.

Corruptions are made while images are loaded, or read from ImageNet-C on disk. A run that was
stopped goes on where it was.

Examples:
    python tools/analysis_tools/test_robustness.py configs/biformer_s_in1k.py \\
        biformer_small_best.pth --data-root data/imagenet-c
    python tools/analysis_tools/test_robustness.py configs/maskrcnn_biformer_s_coco.py \\
        epoch_12.pth --corruptions fog blur --severities 1 3 5
"""

import argparse
import copy
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import DATASETS, init_default_scope

from mmbiformer.commands.faults import run_command
from mmbiformer.commands.options import add_run_options, load_config
from mmbiformer.commands.preflight import RANKS, check_data
from mmbiformer.commands.runner import build_runner
from mmbiformer.errors import UserError
from mmbiformer.evaluation.robustness import (
    CORRUPTIONS,
    GROUPS,
    SEVERITIES,
    corruption_errors,
    mean_corruption_error,
    mean_performance,
)
from mmbiformer.files import write_figure, write_whole

HOLDOUT = 'speckle_noise', 'gaussian_blur', 'spatter', 'saturate'
CHOICES = {'all': CORRUPTIONS, **GROUPS, 'holdout': HOLDOUT}
CHOICES |= {name: (name,) for name in (*CORRUPTIONS, *HOLDOUT)}
METRICS = dict(mmpretrain='accuracy/top1', mmdet='coco/bbox_mAP', mmseg='mIoU')
"""The figure of each host that is tabled."""
CLEAN = 'clean'

Metrics = dict[str, float]
Results = dict[str, dict[int, Metrics]]
"""Metrics by corruption and severity; those without corruption are at ``['clean'][0]``."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_options(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--corruptions',
        nargs='+',
        default=['all'],
        choices=[*CHOICES],
        metavar='NAME',
        help=f'names or groups: {", ".join(CHOICES)} (default: all, the fifteen of the benchmark)',
    )
    parser.add_argument(
        '--severities', nargs='+', type=int, default=[*SEVERITIES], choices=SEVERITIES, metavar='N'
    )
    parser.add_argument(
        '--data-root', metavar='DIR', help='ImageNet-C on disk: DIR/CORRUPTION/SEVERITY/CLASS/NAME'
    )
    parser.add_argument('--metric', help='the metric that is tabled (default: usual for the host)')
    parser.add_argument('--seed', type=int, default=0, help='of the corruptions (default: 0)')
    return parser.parse_args()


def with_pipelines(dataset: Any) -> Iterator[dict]:
    """The configs of data sets that have a pipeline, inside wrappers too."""
    if isinstance(dataset, (list, tuple)):
        for each in dataset:
            yield from with_pipelines(each)
    elif isinstance(dataset, dict):
        if 'pipeline' in dataset:
            yield dataset
        yield from with_pipelines(dataset.get('dataset') or dataset.get('datasets'))


def kind(step: dict) -> str:
    """The name of a transform without its scope."""
    name = step['type']
    return (name if isinstance(name, str) else name.__name__).rpartition('.')[2]


def corrupted_loader(cfg: Config, corruption: str, severity: int, seed: int) -> Any:
    """The test data with a corruption.

    Classifiers' images are corrupted last, at the size that the model sees, as ImageNet-C's were;
    those of detectors and segmentors first, as loaded, as COCO-C's.
    """
    loader = copy.deepcopy(cfg.test_dataloader)
    step = dict(type='mmbiformer.Corrupt', corruption=corruption, severity=severity, seed=seed)
    part = 'Pack' if cfg.default_scope == 'mmpretrain' else 'LoadImage'
    for dataset in with_pipelines(loader.dataset):
        places = [i for i, each in enumerate(dataset.pipeline) if kind(each).startswith(part)]
        if not places:
            raise UserError(
                f'the test pipeline of {cfg.filename} has no {part}…, beside which corruptions go'
            )
        dataset.pipeline.insert(places[0] + (part == 'LoadImage'), step)
    return loader


def loader_of_folder(cfg: Config, folder: Path) -> Any:
    """The images of a folder of ImageNet-C as they are: they have the model's size already."""
    if not folder.is_dir():
        raise UserError(
            f'there is no folder {folder}; --data-root needs CORRUPTION/SEVERITY/CLASS/NAME in it'
        )
    loader = copy.deepcopy(cfg.test_dataloader)
    (dataset,) = with_pipelines(loader.dataset)
    load, *_, pack = dataset.pipeline
    own = dict(type='mmbiformer.ClassFolders', data_root=str(folder), pipeline=[load, pack])
    if kind(dataset) not in ('ImageNet', 'ClassFolders'):
        own['classes'] = DATASETS.build(dataset).metainfo['classes']
    loader.dataset = own
    return loader


def plan(args: argparse.Namespace, cfg: Config) -> list[tuple[str, int]]:
    """The corruptions and severities that are asked for, and first what is clean."""
    names = dict.fromkeys(name for choice in args.corruptions for name in CHOICES[choice])
    jobs = [(name, severity) for name in names for severity in sorted({*args.severities})]
    try:
        check_data(cfg, ('test',))
    except UserError as error:
        if args.data_root is None:
            raise
        print(f'Without the clean images, and so without figures relative to them: {error}')
        return jobs
    return [(CLEAN, 0), *jobs]


def read_results(path: Path, header: dict[str, Any]) -> Results:
    """Read the results of an earlier run.

    Raises:
        UserError: If that was of another model, or of other images.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    differing = [key for key, value in header.items() if found.get(key) != value]
    if differing:
        key = differing[0]
        raise UserError(
            f'{path} has results of another {key} ({found.get(key)} instead of {header[key]}); '
            'choose another --work-dir or remove the file'
        )
    return {
        name: {int(severity): metrics for severity, metrics in row.items()}
        for name, row in found['results'].items()
    }


def table_of(results: Results, metric: str) -> dict[str, dict[int, float]]:
    """One metric by corruption and severity, without what is clean.

    MMDetection gives no metrics if a model detects nothing.
    """
    return {
        name: {severity: row[severity].get(metric, 0.0) for severity in sorted(row)}
        for name, row in results.items()
        if name != CLEAN
    }


def summarize(results: Results, metric: str) -> dict[str, Any]:
    """The figures of the benchmarks, in percent."""
    table = table_of(results, metric)
    clean = results[CLEAN][0].get(metric, 0.0) if CLEAN in results else None
    if metric == METRICS['mmpretrain']:
        errors = {
            name: {severity: 1 - value / 100 for severity, value in row.items()}
            for name, row in table.items()
        }
        clean_error = None if clean is None else 1 - clean / 100
        summary = dict(
            corruption_errors=corruption_errors(errors), mCE=mean_corruption_error(errors)
        )
        if clean_error is not None:
            summary['relative_corruption_errors'] = corruption_errors(errors, clean_error)
            summary['relative_mCE'] = mean_corruption_error(errors, clean_error)
        return dict(clean=clean, **summary)
    mpc = mean_performance(table)
    rpc = 100 * mpc / clean if mpc is not None and clean else None
    return dict(clean=clean, mPC=mpc, rPC=rpc)


def text_of(results: Results, metric: str) -> str:
    """The table, for the terminal."""
    table, summary = table_of(results, metric), summarize(results, metric)
    severities = sorted({severity for row in table.values() for severity in row})
    extra = {
        heading: summary[key]
        for heading, key in (('CE', 'corruption_errors'), ('rel. CE', 'relative_corruption_errors'))
        if key in summary
    }
    digits = 3 if metric.startswith('coco/') else 1

    def line(name: str, cells: list[Any]) -> str:
        shown = [
            each if isinstance(each, str) else '' if each is None else f'{each:.{digits}f}'
            for each in cells
        ]
        return f'{name:<18}' + ''.join(f'{each:>9}' for each in shown)

    lines = [line(metric, [*map(str, severities), 'mean', *extra])]
    for name, row in table.items():
        cells = [row.get(severity) for severity in severities]
        mean = sum(row.values()) / len(row)
        lines.append(line(name, [*cells, mean, *(column.get(name) for column in extra.values())]))
    lines.append('')
    for key, value in summary.items():
        if not isinstance(value, dict):
            shown = '–' if value is None else f'{value:.{digits}f}'
            lines.append(f'{key.replace("_", " "):<18}{shown:>9}')
    return '\n'.join(lines)


def plot(results: Results, metric: str, path: Path) -> None:
    """Draw the metric over the severities, one field a group."""
    table = table_of(results, metric)
    groups = {group: [n for n in names if n in table] for group, names in GROUPS.items()}
    groups['holdout'] = [name for name in HOLDOUT if name in table]
    groups = {group: names for group, names in groups.items() if names}
    figure, axes = plt.subplots(
        1,
        len(groups),
        figsize=(3.4 * len(groups) + 0.6, 3.6),
        sharey=True,
        layout='constrained',
        squeeze=False,
    )
    clean = results[CLEAN][0].get(metric, 0.0) if CLEAN in results else None
    for field, (group, names) in zip(axes[0], groups.items(), strict=True):
        for name in names:
            row = table[name] if clean is None else {0: clean, **table[name]}
            field.plot([*row], [*row.values()], marker='o', ms=4, label=name.replace('_', ' '))
        field.set(title=group, xlabel='severity', xticks=range(0 if clean is not None else 1, 6))
        field.grid(alpha=0.3)
        field.legend(fontsize=8)
    axes[0, 0].set_ylabel(metric)
    axes[0, 0].set_ylim(bottom=0)
    write_figure(path, figure, dpi=120)
    plt.close(figure)


def main() -> None:
    """Evaluate what is asked for and not there yet; write results, table and plot."""
    args = parse_args()
    cfg = load_config(args)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if cfg.default_scope not in METRICS:
        raise UserError(f'{cfg.filename} is of {cfg.default_scope}, not of {", ".join(METRICS)}')
    if args.data_root is not None and cfg.default_scope != 'mmpretrain':
        raise UserError('--data-root is for classifiers; leave it out to corrupt images on the fly')
    if not os.path.exists(args.checkpoint):
        raise UserError(f'there is no checkpoint {args.checkpoint}')
    metric = args.metric or METRICS[cfg.default_scope]
    work = Path(cfg.work_dir)
    path = work / 'robustness.json'
    header = dict(
        checkpoint=os.path.abspath(args.checkpoint),
        model=zlib.crc32(Config(dict(model=cfg.model)).dump().encode()),
        data=os.path.abspath(args.data_root) if args.data_root else f'on the fly, seed {args.seed}',
    )
    jobs, results = plan(args, cfg), read_results(path, header)
    left = [job for job in jobs if job[1] not in results.get(job[0], {})]
    print(f'{len(jobs) - len(left)} of {len(jobs)} evaluations are there', flush=True)
    evaluate(args, cfg, left, results, header, path)
    # There is no process group if nothing was left to evaluate.
    if os.environ.get(RANKS.get(cfg.launcher, ''), '0') == '0':
        print(f'\n{text_of(results, metric)}\n')
        if len(results) > (CLEAN in results):
            plot(results, metric, work / 'robustness.png')
            print(f'{path}, {work / "robustness.png"}')


def evaluate(
    args: argparse.Namespace,
    cfg: Config,
    jobs: list[tuple[str, int]],
    results: Results,
    header: dict[str, Any],
    path: Path,
) -> None:
    """Evaluate and keep each result as it comes."""
    loaders = []
    for name, severity in jobs:
        if name == CLEAN:
            loaders.append(copy.deepcopy(cfg.test_dataloader))
        elif args.data_root is not None:
            loaders.append(loader_of_folder(cfg, Path(args.data_root, name, str(severity))))
        else:
            loaders.append(corrupted_loader(cfg, name, severity, args.seed))
    if not jobs:
        return
    cfg.test_dataloader = copy.deepcopy(loaders[0])
    cfg.load_from, cfg.resume = args.checkpoint, False
    runner = build_runner(cfg)
    for i, ((name, severity), loader) in enumerate(zip(jobs, loaders, strict=True)):
        runner.logger.info(f'{name}, severity {severity} ({i + 1} of {len(jobs)})')
        if i:
            runner.test_loop.dataloader = runner.build_dataloader(loader)
        metrics = runner.test()
        results.setdefault(name, {})[severity] = {
            key: float(value) for key, value in metrics.items() if isinstance(value, (int, float))
        }
        if is_main_process():
            summary = summarize(results, args.metric or METRICS[cfg.default_scope])
            content = dict(header, summary=summary, results=results)
            write_whole(path, json.dumps(content, indent=1).encode())


if __name__ == '__main__':
    run_command(main)
