"""The commands around training: count, time, look, publish; and what tools/test.py can write."""

import argparse
import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import pickle
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmbiformer.datasets import CLASSES, SEGMENTATION_CLASSES, ShapesSpec, make_shapes
from mmbiformer.datasets.shapes_formats import write_image
from mmbiformer.engine.checks import CommandError, build_model
from mmbiformer.engine.complexity import count_macs
from mmbiformer.engine.fake_data import fake_batch
from mmbiformer.engine.files import write_whole
from mmbiformer.layers import BiLevelRoutingAttention
from mmbiformer.safe_load import CheckpointError, safe_load

ROOT = Path(__file__).parent.parent
# Multiply-adds of the authors' classifiers at 224x224, counted with fvcore on their code.
MACS = {
    'biformer_t': 2_228_044_160,
    'biformer_s': 4_487_312_640,
    'biformer_b': 9_794_514_816,
    'biformer_stl': 4_589_905_728,
    'biformer_stl_nchw': 4_592_615_248,
}
ARCH = 'arch=dict(_delete_=True, depths=(1, 1, 1, 1), embed_dims=(64, 128, 256, 512), mlp_ratio=1)'


@pytest.fixture
def tool(monkeypatch):
    """Runs a command in this process, as its file would."""

    def run(name, *args):
        (path,) = (ROOT / 'tools').rglob(name)
        spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr('sys.argv', [str(path), *map(str, args)])
        module.main()

    return run


@contextlib.contextmanager
def small_disk(size):
    """No file may grow beyond a size, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def toy_config(folder, base, more=''):
    """A shipped config with a toy backbone of the same widths."""
    config = folder / f'{Path(base).stem}.py'
    config.write_text(f"_base_ = '{ROOT}/{base}'\nmodel = dict(backbone=dict({ARCH}))\n{more}\n")
    return config


# Counting


@pytest.mark.parametrize('name', MACS)
def test_macs_of_the_classifiers(name):
    cfg = Config.fromfile(ROOT / f'configs/{name}_in1k.py')
    model = build_model(cfg)
    macs = count_macs(model, torch.zeros(1, 3, 224, 224), mode='tensor')
    assert macs['total'] == pytest.approx(MACS[name], rel=0.01)
    assert macs['total'] == macs['backbone'] + macs['head']
    assert macs['head'] == 1000 * cfg.model.head.in_channels


@pytest.mark.parametrize(('topk', 'grid'), [(1, 4), (4, 4), (4, 2)])
def test_macs_of_the_attention(topk, grid):
    """Term by term; the dense shortcut of the SDPA backend must not show."""
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
    ('base', 'shape', 'parts'),
    [
        ('configs/maskrcnn_biformer_t_coco.py', '128', ['neck', 'rpn_head', 'roi_head']),
        ('configs/upernet_biformer_t_ade20k.py', '64 128', ['decode_head']),
    ],
)
def test_get_flops(base, shape, parts, tool, tmp_path, capsys):
    tool('get_flops.py', toy_config(tmp_path, base), '--shape', *shape.split())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    macs = {row[0]: int(row[1].replace(',', '')) for row in rows if len(row) == 3}
    assert {'backbone', *parts} <= macs.keys()
    assert all(macs[name] > 0 for name in parts)
    assert macs['total'] == sum(macs.values()) - macs['total']


def test_one_value_a_channel(tool, tmp_path):
    config = toy_config(tmp_path, 'configs/biformer_t_in1k.py')
    with pytest.raises(CommandError, match=r'1 image\(s\) of 1x1 .*larger --batch-size or --shape'):
        tool('benchmark.py', config, '--shape', '1', '--repeats', '1', '--warm-up', '0')


def test_wrong_shape(tool):
    with pytest.raises(CommandError, match='--shape 1 2 3'):
        tool('get_flops.py', ROOT / 'configs/biformer_s_in1k.py', '--shape', '1', '2', '3')


# Looking


@pytest.mark.parametrize(
    'base', ['configs/biformer_t_in1k.py', 'configs/retinanet_biformer_t_coco.py']
)
def test_benchmark(base, tool, tmp_path, capsys):
    options = ['--shape', '64', '--batch-size', '2', '--repeats', '1', '--warm-up', '1']
    tool('benchmark.py', toy_config(tmp_path, base), *options)
    out = capsys.readouterr().out
    assert '2 image(s) of 64x64, float32' in out
    for name in ('prediction', 'training step'):
        seconds, rate, peak = (
            next(line for line in out.splitlines() if line.startswith(name))
            .removeprefix(name)
            .split()[:3]
        )
        assert 2 / float(seconds) == pytest.approx(float(rate), rel=0.02)
        assert float(peak) > 0


def test_print_config(tool, tmp_path, capsys):
    options = ['--cfg-options', 'model.head.num_classes=7']
    tool('print_config.py', ROOT / 'configs/biformer_t_in1k.py', *options)
    printed = tmp_path / 'printed.py'
    printed.write_text(capsys.readouterr().out)
    cfg = Config.fromfile(printed)
    assert cfg.model.head.num_classes == 7
    assert cfg.model.backbone.arch == 'tiny'
    with pytest.raises(CommandError, match='there is no config'):
        tool('print_config.py', 'none.py')


def test_browse_dataset(tool, tmp_path):
    """The host's tool, with its own options."""
    spec = ShapesSpec(size=(64, 64), shape_size=(10, 50))
    make_shapes(tmp_path / 'data', 3, 1, spec=spec, progress=False)
    options = f'--output-dir {tmp_path / "out"} --not-show --cfg-options'.split()
    options.append(f'train_dataloader.dataset.data_root={tmp_path / "data"}')
    tool('browse_dataset.py', ROOT / 'configs/demo/maskrcnn_biformer_t_shapes.py', *options)
    assert len(list((tmp_path / 'out').glob('*.jpg'))) == 3
    with pytest.raises(CommandError, match='missing: data/ade'):
        tool('browse_dataset.py', ROOT / 'configs/upernet_biformer_s_ade20k.py')


def test_browse_dataset_of_a_classifier(tool, tmp_path):
    spec = ShapesSpec(size=(64, 64), shape_size=(16, 50), objects=(1, 1))
    make_shapes(tmp_path / 'data', 7, 1, spec=spec, progress=False, format='imagenet')
    options = f'--output-dir {tmp_path / "out"} --not-show --cfg-options'.split()
    options.append(f'train_dataloader.dataset.data_root={tmp_path / "data"}')
    tool('browse_dataset.py', ROOT / 'configs/demo/biformer_t_shapes.py', *options)
    assert len(list((tmp_path / 'out').rglob('*.*'))) == 7


def test_browse_dataset_of_other_classes(tool, tmp_path):
    """The host finds seven folders where the recipe has a thousand."""
    spec = ShapesSpec(size=(64, 64), shape_size=(16, 50), objects=(1, 1))
    make_shapes(tmp_path / 'data', 7, 1, spec=spec, progress=False, format='imagenet')
    options = ['--cfg-options', f'train_dataloader.dataset.data_root={tmp_path / "data"}']
    with pytest.raises(CommandError, match=r'number of subfolders \(7\)'):
        tool('browse_dataset.py', ROOT / 'configs/biformer_t_in1k.py', '--not-show', *options)


def test_plot_logs(tool, tmp_path, capsys):
    for run, losses in (('a', [3.0, 2.0]), ('b', [4.0, 1.0])):
        log = tmp_path / run / '20260101_000000' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        records = [{'loss': x, 'lr': 0.1, 'step': i + 1} for i, x in enumerate(losses)]
        records.append({'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.7, 'step': 1})
        log.write_text('\n'.join(map(json.dumps, records)))
    out = tmp_path / 'new' / 'curves.png'
    tool('plot_logs.py', tmp_path / 'a', tmp_path / 'b', '--out', out)
    assert 'drew 2 curve(s) of 2 run(s)' in capsys.readouterr().out
    assert out.stat().st_size > 5000
    with pytest.raises(CommandError, match='acc: not logged; there are loss, lr'):
        tool('plot_logs.py', tmp_path / 'a', '--keys', 'acc')
    with pytest.raises(CommandError, match='there is no run in it'):
        tool('plot_logs.py', tmp_path)


def test_publish_model(tool, tmp_path, capsys):
    state = build_model(Config.fromfile(toy_config(tmp_path, 'configs/biformer_t_in1k.py')))
    state = state.state_dict()
    state._metadata['backbone']['version'] = 3  # which tells STL-nchw from STL
    averaged = {f'module.{key}': value + 1 for key, value in state.items()} | {'steps': 3}
    more = copy.copy(state)
    more['head.tool'] = argparse.Namespace()  # of which only a name would be left
    checkpoint = dict(
        meta=dict(epoch=2, cfg='…', hook_msgs={}, experiment_name='mine', time='now'),
        state_dict=more,
        ema_state_dict=averaged | {'module.head.tool': argparse.Namespace()},
        ema_at_side=True,
        optimizer=dict(state=state),
    )
    source = tmp_path / 'epoch_2.pth'
    torch.save(checkpoint, source)
    tool('publish_model.py', source, tmp_path / 'out' / 'biformer.pth')
    tool('publish_model.py', source, tmp_path / 'out' / 'ema.pth', '--ema')
    raw, ema = (next((tmp_path / 'out').glob(f'{name}-*.pth')) for name in ('biformer', 'ema'))
    for path, offset in ((raw, 0), (ema, 1)):
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.split('-')[1])
        published = safe_load(path)
        assert published.keys() == {'meta', 'state_dict'}
        assert published['meta'] == dict(epoch=2, cfg='…')
        assert published['state_dict'].keys() == state.keys()
        assert published['state_dict']._metadata['backbone'] == dict(version=3)
        for key in state:
            assert torch.equal(published['state_dict'][key], state[key] + offset)
    assert len(list((tmp_path / 'out').iterdir())) == 2
    with pytest.raises(CommandError, match='no averaged weights'):
        tool('publish_model.py', raw, tmp_path / 'again.pth', '--ema')


NORM = 'backbone.stages.0.0.norm1.weight'
STATE = {NORM: torch.ones(2)}
SIDE = dict(state_dict=STATE, ema_at_side=True)


@pytest.mark.parametrize(
    ('checkpoint', 'message'),
    [
        (dict(state_dict=STATE, meta=[]), 'its meta is a list instead of a dictionary'),
        (dict(state_dict=STATE, meta=None), 'its meta is a NoneType instead'),
        (dict(state_dict=[], model=STATE), 'was not written by this project'),
        (dict(state_dict={NORM: 3}), r'x\.pth is damaged: weights are no tensors'),
        (dict(state_dict=STATE, ema_state_dict={}), '--ema: .* leave out --ema'),
        (dict(SIDE, ema_state_dict=[]), '--ema: the averaged weights in .* are not'),
        (dict(SIDE, ema_state_dict={3: 4}), '--ema: .* are not those of its model'),
        (dict(SIDE, ema_state_dict=STATE), '--ema: .* are not those of its model'),
        (
            dict(SIDE, ema_state_dict={f'module.{NORM}': torch.ones(3)}),
            '--ema: .* are not those of its model; leave out --ema',
        ),
    ],
)
def test_publish_refuses_odd_files(checkpoint, message, tool, tmp_path):
    torch.save(checkpoint, tmp_path / 'x.pth')
    with pytest.raises((CheckpointError, CommandError), match=message):
        options = ['--ema'] * ('ema_state_dict' in checkpoint)
        tool('publish_model.py', tmp_path / 'x.pth', tmp_path / 'y.pth', *options)
    assert [path.name for path in tmp_path.iterdir()] == ['x.pth']


@pytest.mark.parametrize('name', ['convert_checkpoint.py', 'publish_model.py'])
@pytest.mark.parametrize(
    ('part', 'value', 'message'),
    [
        (NORM, torch.tensor([1, torch.nan]), 'is not finite'),
        ('head.fc.bias', torch.tensor([torch.inf]), 'is not finite'),
        ('head.fc.bias', torch.tensor([1e300], dtype=torch.float64), 'is not finite'),
        (NORM, torch.ones(2, dtype=torch.int8), 'is of torch.int8 instead of torch.float32'),
        ('head.fc.weight', torch.ones(2, dtype=torch.int8), 'is of torch.int8 instead'),
    ],
)
def test_weights_that_nothing_could_load(name, part, value, message, tool, tmp_path):
    steps = {'backbone.norm.num_batches_tracked': torch.tensor(3), 'head.index': torch.arange(3)}
    torch.save(dict(state_dict={**STATE, **steps, part: value}), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=rf'x\.pth: weights are .*: {part} {message}'):
        tool(name, tmp_path / 'x.pth', tmp_path / 'y.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['x.pth']
    torch.save(dict(state_dict={**STATE, **steps}), tmp_path / 'x.pth')
    tool(name, tmp_path / 'x.pth', tmp_path / 'y.pth')


def test_full_disk(tool, tmp_path):
    """One message; no half file under any name."""
    source = tmp_path / 'source.pth'
    torch.save(dict(meta={}, state_dict=dict(STATE, x=torch.ones(2**16))), source)
    for name, args in (
        ('convert_checkpoint.py', [source, tmp_path / 'out' / 'x.safetensors']),
        ('convert_checkpoint.py', [source, tmp_path / 'out' / 'x.pth']),
        ('publish_model.py', [source, tmp_path / 'out' / 'x.pth']),
    ):
        message = r'out/x\S+ cannot be written \(0 MB\): File too large. Make room'
        with small_disk(100_000), pytest.raises(CheckpointError, match=message):
            tool(name, *args)
        assert not [*(tmp_path / 'out').iterdir()]


def test_files_of_others_stay(tmp_path):
    """A browser's half a download, say."""
    (tmp_path / 'x.pth.partial').write_text("the user's own")
    write_whole(tmp_path / 'x.pth', b'1')
    with small_disk(0), pytest.raises(CheckpointError, match='cannot be written'):
        write_whole(tmp_path / 'x.pth', b'2')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['x.pth', 'x.pth.partial']
    assert (tmp_path / 'x.pth').read_bytes() == b'1'
    assert (tmp_path / 'x.pth.partial').read_text() == "the user's own"


@pytest.mark.parametrize('layout', ['coco', 'ade20k', 'imagenet'])
def test_full_disk_of_shapes(layout, tool, tmp_path, capsys):
    """Wherever it is full, the set can be made again."""
    options = ['--format', layout, '--train', '2', '--val', '1', '--size', '64', '64']
    options += ['--shape-size', '16', '40', '--out', tmp_path / 'set']
    for size in (600, 40):
        with small_disk(size), pytest.raises(CommandError, match='cannot be written: File too la'):
            tool('make_shapes.py', *options)
        assert not (tmp_path / 'set' / 'meta.json').exists()
    tool('make_shapes.py', *options)
    picture = tmp_path / 'preview.png'
    with small_disk(1000), pytest.raises(CheckpointError, match=r'preview\.png cannot be written'):
        tool('make_shapes.py', *options, '--preview', picture)
    assert not [*tmp_path.glob('preview*')]


def test_full_disk_of_images(tmp_path):
    """OpenCV itself writes an empty PNG file, and calls that a success."""
    for name in ('x.png', 'x.jpg'):
        with small_disk(20), pytest.raises(OSError, match='File too large'):
            write_image(tmp_path / name, torch.zeros(9, 9, 3, dtype=torch.uint8).numpy())


def test_convert_of_nested_weights(tool, tmp_path, capsys):
    """Under `model`, where training scripts other than MMEngine's put them."""
    state = {'backbone.stages.0.0.norm1.weight': torch.ones(2), 'steps': 3}
    torch.save({'model': state, 'optimizer': {}}, tmp_path / 'nested.pth')
    tool('convert_checkpoint.py', tmp_path / 'nested.pth', tmp_path / 'new' / 'x.pth')
    assert 'wrote 1 tensors' in capsys.readouterr().out
    assert [*safe_load(tmp_path / 'new' / 'x.pth')['state_dict']] == [*state][:1]


@pytest.mark.parametrize('values', [{}, {'backbone.stages.0.0.norm2.weight': torch.ones(2)}])
def test_command_refuses_names_without_tensors(values, tool, tmp_path):
    """Nothing is left out of the backbone, and no file without weights is written."""
    for name in (NORM, 'stages.0.0.mlp.0.weight'):
        torch.save({'model': {**values, name: 'x'}}, tmp_path / 'source.pth')
        with pytest.raises(CheckpointError, match=rf"no tensors, such as \['{name}'\]"):
            tool('convert_checkpoint.py', tmp_path / 'source.pth', tmp_path / 'x.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['source.pth']


def test_command_does_not_multiply_shared_memory(tool, tmp_path):
    shared = torch.ones(2**19)
    source = tmp_path / 'source.pth'
    torch.save({NORM: torch.ones(2)} | {f'a{i}': shared.view(-1) for i in range(20)}, source)
    with pytest.raises(CommandError, match=r'SRC has 2 MB, but 42 MB as safetensors.*\.pth'):
        tool('convert_checkpoint.py', source, tmp_path / 'x.safetensors')
    tool('convert_checkpoint.py', source, tmp_path / 'x.pth')
    assert (tmp_path / 'x.pth').stat().st_size < 1.01 * source.stat().st_size
    torch.save({NORM: torch.ones(2), 'a': shared, 'b': shared}, source)  # tied weights
    tool('convert_checkpoint.py', source, tmp_path / 'x.safetensors')
    assert torch.equal(safe_load(tmp_path / 'x.safetensors')['b'], shared)


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('head.x', torch.ones(2, dtype=torch.complex128), "'head.x' is of torch.complex128"),
        ('head.x', torch.ones(2).to(torch.float8_e4m3fn), None),
    ],
)
def test_command_knows_what_safetensors_takes(name, value, message, tool, tmp_path):
    torch.save({NORM: torch.ones(2), name: value}, tmp_path / 'source.pth')
    args = 'convert_checkpoint.py', tmp_path / 'source.pth'
    if message is None:
        tool(*args, tmp_path / 'x.safetensors')
        assert safe_load(tmp_path / 'x.safetensors')[name].dtype == value.dtype
        return
    with pytest.raises(CommandError, match=rf'{message}.*give DST a name in \.pth'):
        tool(*args, tmp_path / 'x.safetensors')
    assert not [*tmp_path.glob('x.*')]
    tool(*args, tmp_path / 'x.pth')


def test_command_says_what_safetensors_cannot_hold(tool, tmp_path):
    """A name of a file that is no Unicode."""
    source = tmp_path / os.fsdecode(b'\xff.pth')
    torch.save({NORM: torch.ones(2)}, source)
    message = r'safetensors cannot hold these weights: UnicodeEncodeErr.*give DST a name in \.pth'
    with pytest.raises(CommandError, match=message):
        tool('convert_checkpoint.py', source, tmp_path / 'x.safetensors')
    assert not [*tmp_path.glob('x.*')]


def test_fake_batch_needs_a_known_host():
    with pytest.raises(ValueError, match="default_scope='mmocr'"):
        fake_batch(Config(dict(default_scope='mmocr')), 1, (32, 32))


# What tools/test.py writes, host by host

AUGMENTED = """
tta_pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[
    [dict(type='Resize', scale=(64, 64)), dict(type='Resize', scale=(96, 96))],
    [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
    [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]])]
"""
"""The shipped one, of twelve large images, takes long on CPU."""

EVALUATED = {
    'mmpretrain': (
        'configs/biformer_t_in1k.py',
        'imagenet',
        f"""
data_root = '{{data}}'
model['head'] = dict(num_classes=7)
data_preprocessor = dict(num_classes=7)
test_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    data_root=data_root, metainfo=dict(classes={sorted(CLASSES)})))
""",
    ),
    'mmdet': (
        'configs/retinanet_biformer_t_coco.py',
        'coco',
        f"""
data_root = '{{data}}/'
model['bbox_head'] = dict(num_classes=7)
test_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(
    data_root=data_root, ann_file='annotations/instances_val.json', data_prefix=dict(img='val/'),
    metainfo=dict(classes={CLASSES})))
test_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
model['test_cfg'] = dict(score_thr=0.0, max_per_img=5)
""",
    ),
    'mmseg': (
        'configs/sfpn_biformer_t_ade20k.py',
        'ade20k',
        f"""
data_root = '{{data}}'
model['decode_head'] = dict(num_classes=8)
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    type='BaseSegDataset', data_root=data_root, reduce_zero_label=True,
    metainfo=dict(classes={SEGMENTATION_CLASSES}, palette={[[i] * 3 for i in range(8)]})))
"""
        + AUGMENTED,
    ),
}


@pytest.mark.parametrize(
    ('host', 'options'),
    [
        ('mmpretrain', ['--tta']),
        ('mmpretrain', ['--show-dir']),
        ('mmdet', ['--tta', '--show-dir']),
        ('mmseg', ['--tta', '--show-dir']),
    ],
)
def test_test_writes_what_is_asked(host, options, tmp_path):
    """Augmented, with predictions and pictures; each host has its own way of doing all three."""
    base, layout, more = EVALUATED[host]
    objects = (1, 1) if layout == 'imagenet' else (2, 4)
    spec = ShapesSpec(size=(64, 64), shape_size=(16, 50), objects=objects)
    make_shapes(tmp_path / 'data', 1, 2, spec=spec, progress=False, format=layout)
    config = toy_config(tmp_path, base, more.format(data=tmp_path / 'data'))
    model = build_model(Config.fromfile(config))
    torch.save(dict(meta={}, state_dict=model.state_dict()), tmp_path / 'model.pth')
    shows = '--show-dir' in options
    options = [*options, tmp_path / 'show'] if shows else options
    done = subprocess.run(
        [
            *(sys.executable, '-W', 'ignore', ROOT / 'tools/test.py', config),
            *(tmp_path / 'model.pth', '--work-dir', tmp_path / 'work'),
            *('--out', tmp_path / 'out.pkl', *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    pictures = [p for p in (tmp_path / 'show').rglob('*') if p.suffix in ('.png', '.jpg')]
    assert len(pictures) == (2 if shows else 0)
    assert 'DumpWholeResults' in done.stdout  # leaves no half a file, see below
    with (tmp_path / 'out.pkl').open('rb') as file:
        assert len(pickle.load(file)) == 2


def test_full_disk_of_pictures(tool, tmp_path):
    """No half ones, which OpenCV would leave without a word."""
    test = runpy.run_path(str(ROOT / 'tools/test.py'))
    backend = test['WholePictures'](str(tmp_path / 'look'))
    with small_disk(100), pytest.raises(CheckpointError, match=r'a_1\.png cannot be written'):
        backend.add_image('a', np.zeros((99, 99, 3), np.uint8), 1)
    assert not [path for path in (tmp_path / 'look').rglob('*') if path.is_file()]
    (tmp_path / 'scalars.json').write_text('{"step": 1, "loss": 2}')
    with small_disk(1000), pytest.raises(CheckpointError, match=r'x\.png cannot be written'):
        tool('plot_logs.py', tmp_path / 'scalars.json', '--out', tmp_path / 'x.png')
    assert not [*tmp_path.glob('*.png*')]


def test_full_disk_of_predictions(tmp_path):
    """No half a pickle."""
    out = tmp_path / 'out' / 'x.pkl'
    metric = runpy.run_path(str(ROOT / 'tools/test.py'))['DumpWholeResults'](str(out))
    metric.process({}, [dict(map=torch.zeros(2**16))])
    message = r'out/x\.pkl cannot be written \(0 MB\): File too large. Make room'
    with small_disk(100_000), pytest.raises(CheckpointError, match=message):
        metric.evaluate(1)
    assert not [*out.parent.iterdir()]


def test_pictures_of_augmented_classification(tool, tmp_path):
    base, layout, more = EVALUATED['mmpretrain']
    spec = ShapesSpec(size=(64, 64), shape_size=(16, 50), objects=(1, 1))
    make_shapes(tmp_path / 'data', 1, 2, spec=spec, progress=False, format=layout)
    config = toy_config(tmp_path, base, more.format(data=tmp_path / 'data'))
    model = build_model(Config.fromfile(config))
    torch.save(dict(meta={}, state_dict=model.state_dict()), tmp_path / 'model.pth')
    with pytest.raises(CommandError, match='--show-dir: MMPretrain cannot paint'):
        tool('test.py', config, tmp_path / 'model.pth', '--tta', '--show-dir', tmp_path / 'show')
