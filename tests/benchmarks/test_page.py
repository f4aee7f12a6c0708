"""The page docs/speed.md says what the results of the benchmarks say."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import plot
from mmbiformer.errors import UserError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / 'benchmarks/results'


def fake(folder):
    """Results in round numbers."""
    common = dict(
        batch=8, threads=2, repeats=3, torch='2', mmbiformer='1', processor='P', date='D', timm='3'
    )
    case = dict(
        seconds={'forward': dict(published=6.0, ours=2.0)},
        peak_bytes_training=dict(published=2**32, ours=2**31),
        difference=1e-6,
        size=[100, 200],
        train_size=[300, 400],
    )
    records = dict(
        biformer=case,
        grids=dict(
            malloc={'MALLOC_MMAP_MAX_': '0'},
            seconds={'512x512': dict(auto=1.0, dense=4.0), '1024x1024': dict(auto=5.0)},
        ),
        gpu=dict(
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
        ),
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
        '| BiFormer-S, 8 x 300x400, memory of a training step | 4.00 GiB | 2.00 GiB | 2.0x |',
        '| 512x512 | 3.81 s | 15.3 s |',
        '| 1024x1024 | 4.77 s | not run |',
        '| 1024x1024 against 512x512 | 1.25x |  |',
        '`MALLOC_MMAP_MAX_=0 python -m benchmarks.cpu grids --out benchmarks/results',
        'median of 3, 2 threads',
        '| stage 1 | ours | 200 µs | 50 % | 250 µs | 80 % |',
        'with float64 in 4 cases',
        'In 1 of them the error was at most twice',
    ):
        assert row in page
    assert 'DeBiFormer' not in page


def test_what_was_not_measured_is_left_out(tmp_path):
    shutil.copy(RESULTS / 'cpu.json', tmp_path)
    page = plot.write_page(plot.read_results(tmp_path), tmp_path)
    assert page.count('## ') == 1 and '## Against the published formulations' in page
    assert [path.name for path in (tmp_path / 'speed').iterdir()] == ['published.svg']


def test_results_that_cannot_be_shown(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='has no results; measure some with  make bench'):
        plot.read_results(tmp_path)
    (tmp_path / 'cpu.json').write_text('{"quick": true}')
    with pytest.raises(UserError, match='was written with --quick'):
        plot.read_results(tmp_path)
    (tmp_path / 'cpu.json').write_text('{')
    monkeypatch.setattr('sys.argv', ['plot', '--results', str(tmp_path), '--out', str(tmp_path)])
    with pytest.raises(UserError, match=r'cpu\.json is not JSON'):
        plot.main()
    assert not (tmp_path / 'speed.md').exists()
