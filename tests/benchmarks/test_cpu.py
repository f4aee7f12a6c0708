"""The benchmarks run, on toys, and keep what they measure."""

import json
import sys

import pytest
import torch

from benchmarks import bixt, cpu
from benchmarks.bixt_baseline import bixt_baseline
from benchmarks.gather_baseline import gather_baseline
from mmbiformer.errors import UserError
from mmbiformer.models import BiFormer, BiXT, DeBiFormer


@pytest.fixture(autouse=True)
def threads():
    """The benchmarks set the number of threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Runs a benchmark on toys and reads what it wrote."""

    def run(name, *more, module=cpu):
        out = tmp_path / f'{name}.json'
        monkeypatch.setattr('sys.argv', ['cpu', name, '--quick', '--threads', '1', *more])
        sys.argv += ['--out', str(out)]
        cpu.main('', module.COMMANDS, name)
        return json.loads(out.read_text())

    return run


@pytest.mark.parametrize('model', [BiFormer, DeBiFormer])
def test_baseline_computes_the_same(model):
    """In float64; in float32 rounding can decide a near-tie of two routes."""
    toy = dict(cpu.QUICK, mlp_ratio=2) if model is BiFormer else cpu.QUICK
    net = model(toy).double().eval()
    x = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(gather_baseline(net)(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('layer_scale', [None, 0.5])
def test_bixt_baseline_computes_the_same(layer_scale):
    net = BiXT(dict(bixt.QUICK, layer_scale=layer_scale)).double().eval()
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(bixt_baseline(net)(x), expected, rtol=1e-10, atol=1e-10)


def test_bixt(measure):
    backends = ['cpp', 'sdpa', 'reference']
    seconds = measure('tokens', module=bixt)['seconds']
    assert [*seconds] == ['49 tokens', '196 tokens', '784 tokens']
    assert all([*times] == backends for times in seconds.values())
    names = ['BiXT-Ti/8', 'DeiT-Ti', 'DeiT-S']
    assert [*measure('rivals', module=bixt)['seconds']['training step']] == names


def test_grids(measure, capsys):
    record = measure('grids', '--repeats', '2')
    seconds = record['seconds']
    assert [*seconds] == ['512x512', '1024x1024', '2048x2048']
    assert [*seconds['512x512']] == ['auto', '7x7', '16x16', 'dense']
    assert [*seconds['2048x2048']] == ['auto', '7x7', '16x16']
    for row, times in record['times'].items():
        assert seconds[row] == pytest.approx({name: sum(x) / 2 for name, x in times.items()})
    assert record['quick']
    assert {'torch', 'mmbiformer', 'python', 'processor', 'date'} <= record.keys()
    assert 'time per pixel, 2048x2048 against 512x512' in capsys.readouterr().out


def test_deterministic(measure):
    assert [*measure('deterministic')['seconds']['training step']] == ['default', 'deterministic']
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow  # processes of their own, whole models, a compiler
def test_other_commands(measure):
    record = measure('biformer')
    assert record['difference'] < 1e-4
    assert [*record['seconds']] == ['forward', 'training step']
    assert all(peak > 0 for peak in record['peak_bytes_training'].values())
    record = measure('s4', module=bixt)
    assert record['difference'] < 1e-4
    assert record['peak_bytes_training'].keys() == {'published', 'ours'}
    assert [*measure('rivals')['seconds']['forward']] == [*cpu.RIVALS]
    half = measure('half')['seconds']
    assert [*half['forward']] == ['fused, float32', 'fused', 'sdpa', 'ConvNeXt-S']
    assert len(half['training step']) == 4
    record = measure('compile')
    assert record['compile_seconds'].keys() == record['seconds'].keys()
    record = measure('export')
    files = ['ONNX Runtime', 'AOTInductor', 'ONNX Runtime, any size', 'AOTInductor, any size']
    assert [*record['seconds']['1 x 28x28']] == ['eager', *files]
    assert [*record['export_seconds']] == files


def test_interrupted_benchmark_keeps_its_rows(measure, monkeypatch, tmp_path):
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
    with pytest.raises(UserError, match=r'coco: the published formulation needs .* GiB are free'):
        cpu.main('', cpu.COMMANDS, 'coco')


def test_input_pipeline(tmp_path, monkeypatch, capsys):
    """Images a second of one core, config by config."""
    pytest.importorskip('mmpretrain')
    from benchmarks import input_pipeline

    out = tmp_path / 'rates.json'
    monkeypatch.setattr('sys.argv', ['input_pipeline', '--quick', '--out', str(out)])
    input_pipeline.main()
    rates = json.loads(out.read_text())['images_per_second']
    assert [*rates] == [*input_pipeline.CONFIGS] and min(rates.values()) > 0
    assert 'images a second' in capsys.readouterr().out
