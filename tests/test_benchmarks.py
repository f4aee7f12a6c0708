"""The benchmarks run, on toys, and keep what they measure."""

import json
import sys

import pytest
import torch

from benchmarks import cpu
from benchmarks.gather_baseline import gather_baseline
from mmbiformer.engine.checks import CommandError
from mmbiformer.models import BiFormer, DeBiFormer


@pytest.fixture(autouse=True)
def threads():
    """The benchmarks set their number for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Runs a benchmark on toys and reads what it wrote."""

    def run(name, *more):
        out = tmp_path / f'{name}.json'
        monkeypatch.setattr('sys.argv', ['cpu', name, '--quick', '--threads', '1', *more])
        sys.argv += ['--out', str(out)]
        cpu.main()
        return json.loads(out.read_text())

    return run


@pytest.mark.parametrize('model', [BiFormer, DeBiFormer])
def test_baseline_computes_the_same(model):
    """In float64; in float32 rounding can tip a near-tie of two routes."""
    torch.manual_seed(0)
    toy = dict(cpu.QUICK, mlp_ratio=2) if model is BiFormer else cpu.QUICK
    net = model(toy).double().eval()
    x = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(gather_baseline(net)(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow  # memory is measured in processes of their own
def test_case(measure):
    record = measure('biformer', '--repeats', '2')
    assert record['quick'] and record['difference'] < 1e-4
    assert [*record['seconds']] == ['forward', 'training step']
    for row, times in record['times'].items():
        assert [*times] == ['published', 'ours']
        for name, values in times.items():
            assert len(values) == 2
            assert record['seconds'][row][name] == pytest.approx(sum(values) / 2)
    assert all(peak > 0 for peak in record['peak_bytes_training'].values())
    assert {'torch', 'mmbiformer', 'python', 'processor', 'date'} <= record.keys()


def test_grids(measure, capsys):
    seconds = measure('grids')['seconds']
    assert [*seconds] == ['512x512', '1024x1024', '2048x2048']
    assert [*seconds['512x512']] == ['auto', '7x7', '16x16', 'dense']
    assert [*seconds['2048x2048']] == ['auto', '7x7', '16x16']
    assert 'time per pixel, 2048x2048 against 512x512' in capsys.readouterr().out


def test_deterministic(measure):
    assert [*measure('deterministic')['seconds']['training step']] == ['default', 'deterministic']
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow  # it compiles
def test_export(measure):
    record = measure('export')
    assert [*record['seconds']] == ['1 x 28x28', '2 x 28x28']
    files = ['ONNX Runtime', 'AOTInductor', 'ONNX Runtime, any size', 'AOTInductor, any size']
    assert [*record['seconds']['1 x 28x28']] == ['eager', *files]
    assert [*record['export_seconds']] == files


@pytest.mark.slow
def test_rivals_and_compile(measure):
    assert [*measure('rivals')['seconds']['forward']] == [*cpu.RIVALS]
    record = measure('compile')
    assert record['compile_seconds'].keys() == record['seconds'].keys()


def test_what_was_measured_is_kept(measure, monkeypatch, tmp_path):
    """A run that ends half way leaves its earlier rows."""

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(cpu, 'training_step', fail)
    with pytest.raises(MemoryError):
        measure('debiformer')
    record = json.loads((tmp_path / 'debiformer.json').read_text())
    assert [*record['seconds']] == ['forward']


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr('sys.argv', ['cpu', 'coco'])
    monkeypatch.setattr(cpu, 'NEEDED_BYTES', dict(coco=2**60))
    monkeypatch.setattr(cpu, 'candidate', None)  # nothing large may start
    with pytest.raises(
        CommandError, match=r'coco: the published formulation needs .* GiB are free'
    ):
        cpu.main()
