"""The commands: what they refuse, what they write, and that a wrong file is not kept."""

import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmbiformer.commands import export
from mmbiformer.commands.runner import build_model
from mmbiformer.errors import CheckpointError, UserError
from mmbiformer.export.aoti import run_package
from mmbiformer.export.onnx import run_onnx
from tests.export.test_files import (
    ARCHS,
    BiFormer,
    DeBiFormer,
    OnnxFile,
    assert_equals_pytorch,
)
from tests.helpers.in_process import run_tool

ROOT = Path(__file__).parents[2]
CLASSIFIER = 'configs/biformer_t_in1k.py'


def toy_config(folder, base=CLASSIFIER, more='region_grid=3'):
    """A shipped config with a small backbone."""
    arch = ARCHS[DeBiFormer if 'debiformer' in base else BiFormer]
    config = folder / f'{Path(base).stem}.py'
    head = 'head=dict(in_channels=64, num_classes=7)' if base.endswith('in1k.py') else ''
    config.write_text(
        f"_base_ = '{ROOT}/{base}'\n"
        f'model = dict(backbone=dict(arch=dict(_delete_=True, **{arch}), {more}), {head})\n'
    )
    return config


def save_checkpoint(config, path):
    model = build_model(Config.fromfile(config))
    torch.save(dict(meta={}, state_dict=model.state_dict()), path)
    return model.eval()


@pytest.mark.parametrize('family', ['biformer', pytest.param('debiformer', marks=pytest.mark.slow)])
def test_logits_of_a_checkpoint(family, tmp_path):
    config = toy_config(tmp_path, f'configs/{family}_t_in1k.py')
    model = save_checkpoint(config, tmp_path / 'model.pth')
    out = tmp_path / 'new' / 'logits.onnx'
    printed = run_tool(
        'export_onnx',
        config,
        tmp_path / 'model.pth',
        '--out',
        out,
        '--shape',
        75,
        91,
        '--normalized',
    )
    assert f'wrote {out}: ' in printed and 'opset 18' in printed
    assert 'input: images (batch, 3, 75, 91), float32, normalized: RGB, mean [123.675' in printed
    assert 'outputs: logits' in printed and 'equal to PyTorch to ' in printed
    assert 'random' not in printed
    file = OnnxFile(out)
    assert file.inputs == {'images': ['batch', 3, 75, 91]}
    images = torch.randn(3, 3, 75, 91)
    assert file(images)[0][0].shape == (3, 7)
    assert_equals_pytorch(lambda x: (model(x, mode='tensor'),), file, images)


def test_backbone_for_one_size(tmp_path):
    """The grid may depend on the size then."""
    config = toy_config(tmp_path, 'configs/upernet_biformer_s_ade20k.py', "region_grid='auto'")
    out = tmp_path / 'maps.onnx'
    run_tool('export_onnx', config, '--backbone', '--shape', 64, 96, '--out', out)
    assert OnnxFile(out).inputs == {'images': ['batch', 3, 64, 96]}
    assert run_onnx(out)(torch.randn(2, 3, 64, 96))[0].shape == (2, 32, 16, 24)


@pytest.mark.slow  # it compiles
def test_package_of_the_command(tmp_path):
    out = tmp_path / 'logits.pt2'
    printed = run_tool('export_aoti', toy_config(tmp_path), '--out', out, '--shape', 64)
    assert 'no CHECKPOINT is given: the weights are random' in printed
    assert run_package(out)(torch.randn(3, 3, 64, 64))[0].shape == (3, 7)


@pytest.mark.parametrize(
    ('name', 'first'),
    [('maskrcnn_biformer_t_coco', 'person'), ('upernet_biformer_s_ade20k', 'wall'),
     ('biformer_t_in1k', 'tench, Tinca tinca')],
)  # fmt: skip
def test_names_of_classes(name, first, tmp_path):
    """Those of the data set where neither checkpoint nor config has any."""
    config = Config.fromfile(toy_config(tmp_path, f'configs/{name}.py'))
    assert export._build(config, None)[1][0] == first


def test_config_without_test_data(tmp_path):
    """Its backbone is exported all the same."""
    config = Config.fromfile(toy_config(tmp_path))
    config.pop('test_dataloader')
    model, names = export._build(config, None)
    assert isinstance(model.backbone, BiFormer) and names == ()


def test_new_style_pipeline(tmp_path):
    """Classes as types, in a data set that is wrapped or not."""
    config = Config.fromfile(toy_config(tmp_path, 'configs/maskrcnn_biformer_t_coco.py'))
    for step in config.test_dataloader.dataset.pipeline:
        step.type = type(step.type, (), {})
    assert export._canvas(config, None) == (800, 1344)
    config.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[])
    assert export._canvas(config, None) == (800, 1280)


REFUSED = {
    'segmentor': (
        'configs/sfpn_biformer_t_ade20k.py', ['--out', 'a.onnx', '--normalized'],
        'this model is of type EncoderDecoder; --backbone exports the feature maps',
    ),
    'suffix': (CLASSIFIER, ['--out', 'a.pt2'], '--out a.pt2: the name must end in .onnx'),
    'existing file': (CLASSIFIER, ['--out', 'there.onnx'], 'there.onnx exists already'),
    'too small': (
        'configs/biformer_stl_nchw_in1k.py',
        ['--out', 'a.onnx', '--normalized', '--shape', 75, 11],
        '--shape 75 11: this model needs images of at least 12x12 pixels',
    ),
    'no checkpoint': (CLASSIFIER, ['none.pth', '--out', 'a.onnx'], 'none.pth'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_refused_before_anything_is_written(case, tmp_path, monkeypatch):
    base, args, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    config = toy_config(tmp_path, base)
    if case == 'too small':  # this layout does not pad patches
        layout = "dict(layout='swin', padding='projected', "
        config.write_text(config.read_text().replace('dict(_delete_', f'{layout}_delete_'))
    Path('there.onnx').touch()
    assert message in run_tool('export_onnx', config, *args, status=2)
    assert {path.name for path in tmp_path.iterdir()} == {config.name, 'there.onnx'}


@pytest.fixture
def fake_export(monkeypatch, tmp_path):
    """Runs the export command with other ways to trace, write and load."""

    def run(write, load, *args):
        config, out = toy_config(tmp_path), tmp_path / 'a.onnx'
        argv = ['export', config, *args, '--out', out, '--shape', 33]
        monkeypatch.setattr('sys.argv', [*map(str, argv)])
        monkeypatch.setattr(export, 'trace', lambda net, size: net)
        export.run_export('', '.onnx', (), '', write, load)

    return run


def write_half(program, path, net):
    path.write_bytes(b'half')


def test_checkpoint_that_does_not_fit(fake_export, tmp_path):
    """MMEngine would only log the weights that are missing."""
    path = tmp_path / 'model.pth'
    model = save_checkpoint(toy_config(tmp_path), path)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('head.')}
    torch.save(dict(meta={}, state_dict=state), path)
    with pytest.raises(CheckpointError, match=r'model\.pth .*head\.fc\.weight is missing'):
        fake_export(write_half, None, path)
    assert {each.name for each in tmp_path.iterdir()} == {'biformer_t_in1k.py', 'model.pth'}


def test_a_wrong_file_is_not_kept(fake_export, tmp_path):
    """A file is written under another name and gets its own after the check."""
    (tmp_path / 'a.partial.onnx').write_text("the user's own")

    def load(path):
        assert path != tmp_path / 'a.onnx' and path.read_bytes() == b'half'
        return lambda images: [torch.ones(1, 7)]

    with pytest.raises(UserError, match='differs from PyTorch'):
        fake_export(write_half, load)
    assert {path.name for path in tmp_path.iterdir()} == {'biformer_t_in1k.py', 'a.partial.onnx'}
    assert (tmp_path / 'a.partial.onnx').read_text() == "the user's own"


def test_the_next_export_removes_what_a_killed_one_left(fake_export, tmp_path, monkeypatch):
    def write(net, path, _):
        assert not any(path.parent.iterdir())
        path.write_bytes(b'half')
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(shutil, 'rmtree', lambda *args, **kwargs: None)
        fake_export(write, None)
    (left,) = tmp_path.glob('.a.onnx*/*')
    with pytest.raises(KeyboardInterrupt):
        fake_export(write, None)
    assert not left.parent.exists()
