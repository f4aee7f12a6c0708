"""The folder of a set: made once, never half, never over something else."""

import cv2
import pytest
import torch

from mmbiformer.errors import UserError
from mmbiformer.shapes import FORMATS, ShapesSpec, coco, folder, make_shapes
from tests.helpers.in_process import run_tool


def make(out, train=3, val=2, seed=0, **kwargs):
    return make_shapes(out, train, val, seed, progress=False, **kwargs)


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob('*.*')}


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """One set of each format; tests only read them."""
    out = tmp_path_factory.mktemp('shapes')
    for name in FORMATS:
        assert make(out / name, format=name)
    return out


def test_images_do_not_depend_on_processes(sets, tmp_path, monkeypatch):
    """Several processes draw the same scenes, in the same order."""
    monkeypatch.setattr(folder, 'SCENES_PER_WORKER', 1)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    make(tmp_path)
    assert contents(tmp_path) == contents(sets / 'coco')


def test_complete_set_is_kept(sets):
    """The same set is not made again."""
    stamp = (sets / 'coco/meta.json').stat().st_mtime_ns
    assert not make(sets / 'coco')
    assert (sets / 'coco/meta.json').stat().st_mtime_ns == stamp


def test_formats_replace_one_another(sets, tmp_path):
    """Only on request, and then nothing is left of the other."""
    make(tmp_path)
    for name in ('ade20k', 'imagenet', 'coco'):
        with pytest.raises(UserError, match='other parameters'):
            make(tmp_path, format=name)
        assert make(tmp_path, format=name, overwrite=True)
        assert contents(tmp_path) == contents(sets / name)


@pytest.mark.parametrize(
    ('name', 'lost'),
    [
        ('coco', 'val/000001.jpg'),
        ('ade20k', 'annotations/training/000001.png'),
        ('ade20k', 'images/validation/000000.jpg'),
        ('imagenet', 'train/rectangle/000001.jpg'),
    ],
)
def test_damaged_set_is_made_anew(name, lost, tmp_path):
    make(tmp_path, format=name)
    (tmp_path / lost).unlink()
    assert make(tmp_path, format=name)
    assert (tmp_path / lost).exists()


def test_interrupted_set_is_made_anew(sets, tmp_path, monkeypatch):
    write = coco.write_image

    def break_off(path, *rest):
        if path.name == '000002.jpg':
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(coco, 'write_image', break_off)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    assert not (tmp_path / 'meta.json').exists()
    assert make(tmp_path)
    assert contents(tmp_path) == contents(sets / 'coco')


@pytest.mark.parametrize('overwrite', [False, True])
def test_foreign_folder_is_refused(overwrite, tmp_path):
    """A folder of other origin stays as it is, even on request."""
    (tmp_path / 'meta.json').write_text('{"generator": "other"}')
    (tmp_path / 'train').mkdir()
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(UserError, match='not made by this generator'):
        make(tmp_path, overwrite=overwrite)
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(format='imagenet', spec=ShapesSpec()), 'objects must be 1 1'),
        (dict(format='voc'), "format='voc' is unknown"),
        (dict(seed=-1), 'seed=-1 must not be negative'),
    ],
)
def test_wrong_arguments_change_nothing(kwargs, message, sets):
    before = contents(sets / 'coco')
    with pytest.raises(UserError, match=message):
        make(sets / 'coco', overwrite=True, **kwargs)
    assert contents(sets / 'coco') == before


def test_command(tmp_path):
    """The command makes the set with the options given, then says that it is there."""
    out, sheet = tmp_path / 'set', tmp_path / 'sheet.png'
    options = ['--out', out, '--train', 3, '--val', 2, '--size', 96, 128, '--shape-size', 10, 40]
    assert 'instances per image' in run_tool('make_shapes', *options, '--preview', sheet)
    assert cv2.imread(str(sheet)).shape == (3 * 260, 4 * 196, 3)
    assert cv2.imread(str(out / 'train' / '000002.jpg')).shape == (128, 96, 3)
    assert 'nothing to do' in run_tool('make_shapes', *options)
    assert 'other parameters' in run_tool('make_shapes', '--out', out, '--train', 4, status=2)
    options += ['--preview', tmp_path / 'sheet']
    assert 'must end like a picture' in run_tool('make_shapes', *options, status=2)
