"""The section of docs/speed.md on BiXT."""

from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.page import Results, facts, save, seconds, table


def bixt_section(results: Results, folder: Path) -> str:
    """BiXT beside its published formulation and plain transformers; time by tokens."""
    parts = [_published(results), _rivals(results), _tokens(results, folder)]
    parts = [part for part in parts if part]
    return '\n'.join(['## BiXT\n', *parts]) if parts else ''


def _published(results: Results) -> str:
    rows, notes = [['', 'published', 'ours', 'ratio']], []
    for name, stride in (('bixt_s8', 8), ('bixt_s4', 4)):
        record = results.get(name)
        if record is None:
            continue
        notes.append(facts(name, results))
        for step, times in record['seconds'].items():
            ratio = times['published'] / times['ours']
            label = f'BiXT-Ti/{stride}, {record["batch"]} images, {step}'
            rows.append([label, *map(seconds, times.values()), f'{ratio:.2f}x faster'])
        peaks = record['peak_bytes_training']
        sizes = [f'{peak / 2**30:.2f} GiB' for peak in peaks.values()]
        rows.append(
            ['peak memory of the step', *sizes, f'{peaks["ours"] / peaks["published"]:.2f}x']
        )
    if not notes:
        return ''
    return f"""Beside the published formulation, which writes scores and both softmaxes to memory:

{table(*rows)}

{'; '.join(notes)}.
"""


def _rivals(results: Results) -> str:
    record = results.get('bixt_rivals')
    if record is None:
        return ''
    names = [*record['seconds']['forward']]
    rows = [['', *names]]
    rows += [[step, *map(seconds, times.values())] for step, times in record['seconds'].items()]
    return f"""Beside timm's plain transformers with as many tokens (16x16 pixels every 8):

{table(*rows)}

{facts('bixt_rivals', results)}, timm {record['timm']}.
"""


def _tokens(results: Results, folder: Path) -> str:
    record = results.get('bixt_tokens')
    if record is None:
        return ''
    counts = [int(row.split()[0]) for row in record['seconds']]
    figure, axes = plt.subplots(figsize=(5, 3), layout='constrained')
    for name in next(iter(record['seconds'].values())):
        times = [record['seconds'][f'{n} tokens'][name] / n * 1e6 for n in counts]
        axes.plot(counts, times, marker='o', label=name)
    axes.set(xscale='log', ylim=0, xlabel='tokens', ylabel='microseconds per token')
    axes.set_xticks(counts, [f'{n:,}' for n in counts])
    axes.minorticks_off()
    axes.legend(frameon=False)
    save(figure, folder / 'bixt_tokens.svg')
    first, last = (record['seconds'][f'{n} tokens']['cpp'] / n for n in (counts[0], counts[-1]))
    return f"""The operator is linear in the tokens: a token takes {last / first:.2f} times as long
among {counts[-1]:,} as among {counts[0]:,}.

![Time per token by the number of tokens](speed/bixt_tokens.svg)

{facts('bixt_tokens', results)}.
"""
