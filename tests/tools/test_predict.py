"""tools/predict.py: pictures and results of each host, and files that cannot be read."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmbiformer.commands.pictures import find_sources
from mmbiformer.commands.runner import build_model
from mmbiformer.errors import UserError
from mmbiformer.shapes import CLASSES, SEGMENTATION_CLASSES
from tests.helpers.configs import write_toy
from tests.helpers.in_process import run_tool

MODELS = {
    'mmpretrain': ('biformer_t_in1k', ''),
    'mmdet': (
        'demo/maskrcnn_biformer_t_shapes',
        'model["test_cfg"] = dict(rcnn=dict(score_thr=0.0, max_per_img=5))',
    ),
    'mmseg': ('demo/sfpn_biformer_t_shapes', ''),
}


@pytest.fixture(scope='module', params=MODELS)
def model(request, tmp_path_factory):
    """A host, a config, and a checkpoint without names of classes, as the authors' are."""
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    config = write_toy(folder, *MODELS[request.param])
    DefaultScope._instance_dict.clear()
    torch.manual_seed(0)
    state_dict = build_model(Config.fromfile(config)).state_dict()
    torch.save(dict(meta={}, state_dict=state_dict), folder / 'model.pth')
    return request.param, config, folder / 'model.pth'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two images of one size, one of another in a folder, a video, and what is none of these."""
    path = tmp_path_factory.mktemp('in')
    rng = np.random.default_rng(0)
    (path / 'more').mkdir()
    for name, size in (('a.png', (64, 96)), ('b.bmp', (64, 96)), ('more/a.png', (80, 64))):
        cv2.imwrite(str(path / name), rng.integers(0, 255, (*size, 3), dtype=np.uint8))
    video = cv2.VideoWriter(str(path / 'film.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5, (96, 64))
    for _ in range(3):
        video.write(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))
    video.release()
    (path / 'broken.jpg').write_bytes(b'\xff\xd8 no image')
    (path / 'empty.png').touch()
    (path / 'broken.mp4').write_bytes(b'no video')
    (path / 'notes.txt').write_text('not an image by its name')
    return path


def predict(model, *inputs, out, **kwargs):
    _, config, checkpoint = model
    # MMEngine's default scope is global, and the inferencers keep what is there already.
    DefaultScope._instance_dict.clear()
    options = ['--out', out, '--json', '--device', 'cpu', '--batch-size', '2']
    return run_tool('predict', config, checkpoint, *inputs, *options, **kwargs)


@pytest.fixture(scope='module')
def results(model, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp('out')
    printed = predict(model, folder, folder / 'missing.jpg', out=out, status=1)
    return model, out, printed, json.loads((out / 'predictions.json').read_text())


def test_what_cannot_be_read_is_named(results, folder):
    _, _, printed, _ = results
    named = printed[printed.index('error: not read:') :].splitlines()[1:]
    names = ['broken.jpg', 'broken.mp4', 'empty.png', 'missing.jpg']
    assert [line.split(': ')[0].strip() for line in named] == [str(folder / name) for name in names]
    assert named[-1].endswith('No such file or directory')
    assert '6 image(s) predicted' in printed


def test_pictures(results, folder):
    _, out, _, _ = results
    found = {str(path.relative_to(out)) for path in out.glob('pictures/**/*') if path.is_file()}
    names = 'a.png', 'b.bmp.png', 'more/a.png', 'film.mp4'
    assert found == {f'pictures/{name}' for name in names}
    for source, drawn in zip(('a.png', 'b.bmp', 'more/a.png'), names[:3], strict=True):
        before = cv2.imread(str(folder / source)).astype(float)
        after = cv2.imread(str(out / 'pictures' / drawn)).astype(float)
        assert before.shape == after.shape and not np.array_equal(before, after)
        # Random pixels correlate with nothing but themselves, so the channels are in order.
        for channel in range(3):
            fits = [
                np.corrcoef(before[..., i].flat, after[..., channel].flat)[0, 1] for i in range(3)
            ]
            assert np.argmax(fits) == channel and fits[channel] > 0.05
    video = cv2.VideoCapture(str(out / 'pictures/film.mp4'))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and video.get(cv2.CAP_PROP_FPS) == 5


def test_results(results):
    (host, *_), out, _, content = results
    rows = content['images'] if host == 'mmdet' else content
    frames = [('film.avi', i) for i in range(3)]
    assert [(row['file_name'], row.get('frame')) for row in rows] == [
        *(('a.png', None), ('b.bmp', None)),
        *frames,
        ('more/a.png', None),
    ]
    assert [(row['height'], row['width']) for row in rows] == [(64, 96)] * 5 + [(80, 64)]
    if host == 'mmpretrain':
        assert all(len(row['classes']) == 5 for row in rows)
        assert all(isinstance(one['name'], str) for row in rows for one in row['classes'])
        assert all(0 < one['score'] < 1 for row in rows for one in row['classes'])
    elif host == 'mmseg':
        for row in rows:
            labels = cv2.imread(str(out / row['labels']), cv2.IMREAD_UNCHANGED)
            assert labels.shape == (row['height'], row['width'])
            assert {one['label'] for one in row['classes']} == {*np.unique(labels).tolist()}
            assert sum(one['share'] for one in row['classes']) == pytest.approx(1)
            for one in row['classes']:
                assert one['name'] == SEGMENTATION_CLASSES[one['label']]


@pytest.mark.parametrize('model', ['mmdet'], indirect=True)
def test_coco(results):
    """Programs that read a data set in COCO's format read the predictions."""
    _, out, _, content = results
    coco = pytest.importorskip('pycocotools.coco').COCO(str(out / 'predictions.json'))
    assert [coco.cats[i]['name'] for i in coco.getCatIds()] == [*CLASSES]
    assert len(coco.anns) == len(content['annotations']) == 30
    for one in coco.anns.values():
        image = coco.imgs[one['image_id']]
        assert coco.annToMask(one).shape == (image['height'], image['width'])
        left, top, width, height = one['bbox']
        assert 0 <= left <= left + width <= image['width'] + 1e-3
        assert 0 <= top <= top + height <= image['height'] + 1e-3


def test_batches_change_nothing(model, folder, tmp_path):
    """Images of different sizes are no batch; those of one size have the results of one alone."""
    predict(model, folder / 'a.png', folder / 'b.bmp', out=tmp_path / 'both')
    predict(model, folder / 'b.bmp', out=tmp_path / 'one')
    both, one = (
        json.loads((tmp_path / name / 'predictions.json').read_text()) for name in ('both', 'one')
    )
    if model[0] == 'mmdet':
        both, one = (
            sorted(x['score'] for x in each['annotations'] if x['image_id'] == len(each['images']))
            for each in (both, one)
        )
        assert both == pytest.approx(one, abs=1e-5)
    else:
        key = 'score' if model[0] == 'mmpretrain' else 'share'
        both, one = ([x[key] for x in each[-1]['classes']] for each in (both, one))
        assert both == pytest.approx(one, abs=1e-3)


def test_names_that_collide(tmp_path):
    for name in ('x', 'y'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.png').touch()
    with pytest.raises(UserError, match='would both be written to a'):
        find_sources([str(tmp_path / 'x'), str(tmp_path / 'y')], tmp_path / 'out')


def test_results_are_no_input(tmp_path):
    (tmp_path / 'out').mkdir()
    for name in ('a.png', 'out/a.png'):
        (tmp_path / name).touch()
    (source,) = find_sources([str(tmp_path)], tmp_path / 'out')
    assert source.path == tmp_path / 'a.png'


def test_nothing_to_predict(tmp_path):
    with pytest.raises(UserError, match='no images or videos there'):
        find_sources([str(tmp_path)], tmp_path / 'out')
