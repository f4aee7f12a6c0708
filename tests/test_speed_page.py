"""The page on speed says what the results of the benchmarks say."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import plot
from mmbiformer.engine.checks import CommandError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks/results'


def fake(folder):
    """Results of every command, in round numbers."""
    common = dict(
        batch=8, threads=2, repeats=3, torch='2', mmbiformer='1', processor='P', date='D', timm='3'
    )
    pair = dict(published=6.0, ours=2.0)
    case = dict(
        seconds={'forward': pair, 'training step': dict(published=9.0, ours=2.0)},
        peak_bytes_training=dict(published=2**32, ours=2**31),
        difference=1e-6,
        size=[100, 200],
        train_size=[300, 400],
    )
    sizes = {'512x512': 1.0, '1024x1024': 5.0}
    records = dict(
        biformer=case,
        coco=case,
        rivals=dict(seconds={'forward': {'BiFormer-S': 1.0, 'Swin-S': 2.0}}),
        grids=dict(
            malloc={'MALLOC_MMAP_MAX_': '0'},
            seconds={
                size: {'auto': s} | ({'dense': 4 * s} if s == 1 else {})
                for size, s in sizes.items()
            },
        ),
        deterministic=dict(seconds={'training step': dict(default=1.0, deterministic=1.25)}),
        compile=dict(
            seconds={'forward': dict(eager=3.0, compiled=2.0)}, compile_seconds={'forward': 42.0}
        ),
    )
    records['export'] = dict(
        seconds={'2 x 10x20': {'eager': 3.0, 'ONNX Runtime': 2.0, 'AOTInductor': 4.0}},
        size=[10, 20],
        export_seconds={'ONNX Runtime': 120.0, 'AOTInductor': 60.0},
        onnxruntime='1.2',
    )
    records['gpu'] = dict(
        copy_bytes_per_s=4e12,
        environment=dict(gpu='G', triton='3', torch='2', timm='3', mmbiformer='1', date='D'),
        parity={
            'right': dict(triton=[1.9], reference=[1.0], equal_in_two_runs=True),
            'wrong': dict(triton=[2.1], reference=[1.0], equal_in_two_runs=True),
            'differs': dict(triton=[1.0], reference=[1.0], equal_in_two_runs=False),
            'failed': dict(error='no memory'),
        },
        attention={
            'stage 1': {
                'floor': dict(forward_ms=0.1, backward_ms=0.2),
                'ours': dict(forward_ms=0.2, backward_ms=0.25),
                'other': dict(error='no memory'),
            }
        },
        networks={
            'net': {f'{key}_images_per_s': 1000.0 for key in plot.GPU_SPEEDS}
            | dict(training_peak_bytes=2**31)
        },
        notes=['something to know'],
    )
    for name, record in records.items():
        (folder / plot.FILES[name]).write_text(json.dumps(common | record))


def test_the_page_is_up_to_date(tmp_path):
    page = plot.write_page(plot.read_results(RESULTS), tmp_path)
    assert (ROOT / 'docs/speed.md').read_text() == page, 'run  python -m benchmarks.plot'
    pictures = re.findall(r'\]\((speed/.*?)\)', page)
    assert pictures
    for picture in pictures:
        assert (tmp_path / picture).is_file() and (ROOT / 'docs' / picture).is_file()
    for link in re.findall(r'\]\((\.\./.*?)\)', page):
        assert (ROOT / 'docs' / link).exists()


def test_the_page_says_what_the_results_say(tmp_path):
    fake(tmp_path)
    page = plot.write_page(plot.read_results(tmp_path), tmp_path)
    for row in (
        '| BiFormer-S, 8 x 100x200, forward | 6.00 s | 2.00 s | 3.0x |',
        '| BiFormer-S, 8 x 300x400, training step | 9.00 s | 2.00 s | 4.5x |',
        '| BiFormer-S, 8 x 300x400, memory of a training step | 4.00 GiB | 2.00 GiB | 2.0x |',
        '| BiFormer-S, 16x16 grid, 8 x 100x200, forward | 6.00 s | 2.00 s | 3.0x |',
        '| Swin-S | 4.0 | 2.00x |',
        '| 512x512 | 3.81 s | 15.3 s |',
        '| 1024x1024 | 4.77 s | not run |',
        '| 1024x1024 against 512x512 | 1.25x |  |',
        '`MALLOC_MMAP_MAX_=0 python -m benchmarks.cpu grids --out benchmarks/results',
        '| deterministic, training step | 1.00 s | 1.25 s | 0.80x |',
        '| compiled, forward (first call: 42 s) | 3.00 s | 2.00 s | 1.50x |',
        '| 2 x 10x20 | 3.00 s | 2.00 s | 4.00 s |',
        '| made in |  | 120 s | 60 s |',
        'ONNX Runtime 1.2; median of 3',
        '| stage 1 | ours | 200 µs | 50 % | 250 µs | 80 % |',
        '| net | 1000 | 1000 | 1000 | 1000 | 1000 | 2.0 GiB |',
        '1 of 4 comparisons',
        '- something to know.',
    ):
        assert row in page
    assert 'DeBiFormer' not in page and 'median of 3, 2 threads' in page


def test_what_was_not_measured_is_left_out(tmp_path):
    shutil.copy(RESULTS / 'cpu.json', tmp_path)
    page = plot.write_page(plot.read_results(tmp_path), tmp_path)
    assert page.count('## ') == 1 and '## Against the published formulations' in page
    assert [path.name for path in (tmp_path / 'speed').iterdir()] == ['published.svg']


def test_results_that_cannot_be_shown(tmp_path, monkeypatch):
    with pytest.raises(CommandError, match='has no results; measure some with  make bench'):
        plot.read_results(tmp_path)
    (tmp_path / 'cpu.json').write_text('{"quick": true}')
    with pytest.raises(CommandError, match='was written with --quick'):
        plot.read_results(tmp_path)
    (tmp_path / 'cpu.json').write_text('{')
    monkeypatch.setattr('sys.argv', ['plot', '--results', str(tmp_path), '--out', str(tmp_path)])
    with pytest.raises(CommandError, match=r'cpu\.json is no JSON'):
        plot.main()
    assert not (tmp_path / 'speed.md').exists()
