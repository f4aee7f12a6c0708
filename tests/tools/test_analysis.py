"""The commands around training: count, time, look, print, draw."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmbiformer.commands.complexity import count_macs
from mmbiformer.commands.fake_data import fake_batch
from mmbiformer.errors import UserError
from mmbiformer.layers import BiLevelRoutingAttention
from mmbiformer.shapes import ShapesSpec, make_shapes
from tests.helpers.configs import ENTRIES, ROOT, model_of, write_toy
from tests.helpers.in_process import run_tool

# Counting


@pytest.mark.parametrize('size', ['t', 's', 'b', 'stl', 'stl_nchw'])
def test_macs_of_the_classifiers(size):
    """Norms and activations, which fvcore counts in part, are half a percent."""
    name = f'biformer_{size}_in1k'
    model = model_of(name)
    macs = count_macs(model, torch.empty(1, 3, 224, 224, device='meta'), mode='tensor')
    assert macs['total'] == pytest.approx(ENTRIES[name]['Metadata']['FLOPs'], rel=0.006)
    assert macs['total'] == macs['backbone'] + macs['head']
    assert macs['head'] == 1000 * model.head.in_channels


@pytest.mark.parametrize(('topk', 'grid'), [(1, 4), (4, 4), (4, 2)])
def test_macs_of_the_attention(topk, grid):
    """Term by term, also where a backend would attend to all tokens instead."""
    dim, side = 64, 16
    layer = BiLevelRoutingAttention(dim, num_heads=2, topk=topk, region_grid=grid)
    tokens, regions = side * side, grid * grid
    projections = 4 * tokens * dim * dim
    routing = regions * regions * dim
    attention = 2 * tokens * topk * (tokens // regions) * dim
    lepe = 25 * tokens * dim
    macs = count_macs(layer, torch.zeros(1, side, side, dim))
    assert macs['total'] == projections + routing + attention + lepe
    assert macs['total'] == sum(macs.values()) - macs['total']
    assert layer.backend == 'auto'


@pytest.mark.parametrize(
    ('name', 'shape', 'parts'),
    [
        ('maskrcnn_biformer_t_coco', '128', ['neck', 'rpn_head', 'roi_head']),
        ('upernet_biformer_t_ade20k', '64 128', ['decode_head']),
    ],
)
def test_get_flops(name, shape, parts, tmp_path):
    out = run_tool('get_flops', write_toy(tmp_path, name), '--shape', *shape.split())
    rows = [line.split() for line in out.splitlines()]
    macs = {row[0]: int(row[1].replace(',', '')) for row in rows if len(row) == 3}
    assert {'backbone', *parts} <= macs.keys()
    assert all(macs[name] > 0 for name in parts)
    assert macs['total'] == sum(macs.values()) - macs['total']


def test_wrong_shape():
    config = ROOT / 'configs/biformer_s_in1k.py'
    out = run_tool('get_flops', config, '--shape', '1', '2', '3', status=2)
    assert 'error: --shape 1 2 3: give height and width in pixels, from 1\n' in out


def test_random_images_need_a_known_host():
    with pytest.raises(UserError, match="default_scope='mmocr'"):
        fake_batch(Config(dict(default_scope='mmocr')), 1, (32, 32))


# Timing


@pytest.mark.parametrize('name', ['biformer_t_in1k', 'retinanet_biformer_t_coco'])
def test_benchmark(name, tmp_path):
    options = ['--shape', '64', '--batch-size', '2', '--repeats', '1', '--warm-up', '1']
    out = run_tool('benchmark', write_toy(tmp_path, name), *options)
    assert '2 image(s) of 64x64, float32' in out
    for row in ('prediction', 'training step'):
        (line,) = (line for line in out.splitlines() if line.startswith(row))
        seconds, rate, peak = map(float, line.removeprefix(row).split()[:3])
        assert 2 / seconds == pytest.approx(rate, rel=0.02)
        assert peak > 0


# Looking


def test_print_config(tmp_path):
    options = ['--cfg-options', 'model.head.num_classes=7']
    printed = tmp_path / 'printed.py'
    printed.write_text(run_tool('print_config', ROOT / 'configs/biformer_t_in1k.py', *options))
    cfg = Config.fromfile(printed)
    assert cfg.model.head.num_classes == 7
    assert cfg.model.backbone.arch == 'tiny'


def test_no_config():
    out = run_tool('print_config', 'none.py', status=2)
    assert 'error: there is no config none.py' in out


@pytest.mark.parametrize(
    ('name', 'layout'), [('maskrcnn_biformer_t', 'coco'), ('biformer_t', 'imagenet')]
)
def test_browse_dataset(name, layout, tmp_path):
    """The host's tool, with its own options."""
    objects = (1, 1) if layout == 'imagenet' else (3, 4)
    spec = ShapesSpec(size=(64, 64), shape_size=(16, 50), objects=objects)
    make_shapes(tmp_path / 'data', 7, 1, spec=spec, progress=False, format=layout)
    options = f'--output-dir {tmp_path / "out"} --not-show --cfg-options'.split()
    options.append(f'train_dataloader.dataset.data_root={tmp_path / "data"}')
    run_tool('browse_dataset', ROOT / f'configs/demo/{name}_shapes.py', *options)
    pictures = [path for path in (tmp_path / 'out').rglob('*') if path.suffix != '']
    assert len(pictures) == 7


def test_plot_logs(tmp_path):
    for run, losses in (('a', [3.0, 2.0]), ('b', [4.0, 1.0])):
        log = tmp_path / run / '20260101_000000' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        records = [{'loss': x, 'lr': 0.1, 'step': i + 1} for i, x in enumerate(losses)]
        records.append({'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.7, 'step': 1})
        log.write_text('\n'.join(map(json.dumps, records)))
    out = tmp_path / 'new' / 'curves.png'
    printed = run_tool('plot_logs', tmp_path / 'a', tmp_path / 'b', '--out', out)
    assert 'drew 2 curve(s) of 2 run(s)' in printed
    assert out.stat().st_size > 5000
    before = {*Path().iterdir()}
    run_tool('plot_logs', tmp_path / 'a', tmp_path / 'b')  # beside the first run's logs
    assert (tmp_path / 'a' / 'curves.png').is_file() and {*Path().iterdir()} == before
    printed = run_tool('plot_logs', tmp_path / 'a', '--keys', 'acc', status=2)
    assert 'acc: not logged; there are loss, lr' in printed
    assert 'there is no run in it' in run_tool('plot_logs', tmp_path, status=2)
