"""The runner of exported files: resizing and masks as the hosts have them, and no torch."""

import importlib.util
import json
import subprocess
import sys

import mmcv
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from tests.helpers.configs import ROOT

SCRIPT = ROOT / 'tools' / 'deployment' / 'run_onnx.py'
NONE = np.zeros((1, 2, 2), np.int64)
BLOCKED = """
import runpy, sys
for name in ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'cv2'):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture(scope='module')
def tool():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location('run_onnx', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_file(path, task, resize=(), canvas=(64, 96), **outputs):
    """A file that gives these arrays for any image; logits are the means of the channels."""
    nodes, values = [], []
    for name, array in outputs.items():
        tensor = onnx.numpy_helper.from_array(array, f'{name}_value')
        nodes.append(helper.make_node('Constant', [], [name], value=tensor))
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        values.append(helper.make_tensor_value_info(name, kind, array.shape))
    if task == 'classification':
        nodes = [
            helper.make_node('Cast', ['images'], ['x'], to=TensorProto.FLOAT),
            helper.make_node('ReduceMean', ['x'], ['logits'], axes=[1, 2], keepdims=0),
        ]
        values = [helper.make_tensor_value_info('logits', TensorProto.FLOAT, ['batch', 3])]
    shape = ['batch', 'height', 'width', 3]
    images = helper.make_tensor_value_info('images', TensorProto.UINT8, shape)
    graph = helper.make_graph(nodes, 'graph', [images], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    facts = dict(task=task, canvas=canvas, resize=[*resize], classes=['disc', 'ring', 'star'])
    if 'masks' in outputs:
        facts['mask_threshold'] = 0.5
    model.metadata_props.add(key='mmbiformer', value=json.dumps(facts))
    onnx.save(model, path)
    return path


@pytest.fixture
def photo():
    return mmcv.imread(ROOT / 'docs' / 'demo' / 'maskrcnn.png', channel_order='rgb')[:300, :431]


def test_resizes_as_mmcv(tool, photo, tmp_path):
    steps = [dict(type='Resize', scale=(250, 111), keep_ratio=True)]
    steps += [dict(type='ResizeToMultiple', size_divisor=32)]
    model = tool.Model(
        write_file(tmp_path / 'm.onnx', 'segmentation', steps, (600, 600), labels=NONE)
    )
    expected = mmcv.imrescale(photo, (250, 111))
    height, width = (-(-side // 32) * 32 for side in expected.shape[:2])
    expected = mmcv.imresize(expected, (width, height))
    found = model.prepare(photo)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_resizes_as_mmpretrain(tool, photo, tmp_path):
    transforms = pytest.importorskip('mmpretrain.datasets.transforms')
    edge = dict(scale=80, edge='short', backend='pillow', interpolation='bicubic')
    steps = [dict(edge, type='ResizeEdge'), dict(type='CenterCrop', crop_size=64)]
    model = tool.Model(write_file(tmp_path / 'm.onnx', 'classification', steps, (64, 64)))
    results = transforms.ResizeEdge(**edge)(dict(img=photo))
    expected = transforms.CenterCrop(crop_size=64)(results)['img']
    assert np.array_equal(model.prepare(photo), expected)


def test_fits_the_canvas(tool, photo, tmp_path):
    model = tool.Model(write_file(tmp_path / 'm.onnx', 'detection', labels=NONE))
    assert model.prepare(photo).shape == (64, 92, 3)
    assert model.prepare(photo[:, :40]).shape == (64, 9, 3)
    assert model.prepare(photo[:20, :30]).shape == (20, 30, 3)


def test_boxes_and_masks_of_the_given_image(tool, photo, tmp_path):
    """The image is resized to 64x92 from 300x431."""
    boxes = np.float32([[10, 20, 40, 60], [-3, 0, 92, 9]])
    masks = np.random.default_rng(0).random((2, 28, 28), dtype=np.float32)
    file = write_file(
        tmp_path / 'm.onnx',
        'detection',
        boxes=boxes,
        scores=np.float32([0.9, 0.2]),
        labels=np.int64([2, 0]),
        masks=masks,
    )
    found = tool.Model(file)(photo)
    scale = np.float32([431 / 92, 300 / 64] * 2)
    assert np.allclose(found['boxes'], boxes * scale)
    head = pytest.importorskip('mmdet.models.roi_heads.mask_heads.fcn_mask_head')
    tensors = torch.from_numpy(masks)[:, None], torch.from_numpy(found['boxes'])
    theirs, _ = head._do_paste_mask(*tensors, 300, 431, skip_empty=False)
    assert found['masks'].shape == (2, 300, 431)
    assert (found['masks'] != (theirs.numpy() >= 0.5)).mean() <= 1e-4


def test_labels_of_the_given_image(tool, photo, tmp_path):
    labels = np.arange(64 * 92).reshape(1, 64, 92)
    model = tool.Model(write_file(tmp_path / 'm.onnx', 'segmentation', labels=labels))
    found = model(photo)['labels']
    assert found.shape == (300, 431)
    assert (found[0, 0], found[-1, -1]) == (0, 64 * 92 - 1)
    assert (np.diff(found, axis=1) >= 0).all()


def run(*args):
    """The script without torch and the hosts."""
    command = [sys.executable, '-c', BLOCKED, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_runs_without_torch(photo, tmp_path):
    file = write_file(
        tmp_path / 'm.onnx',
        'detection',
        boxes=np.float32([[10, 20, 40, 60]]),
        scores=np.float32([0.75]),
        labels=np.int64([2]),
        masks=np.ones((1, 28, 28), np.float32),
    )
    image = tmp_path / 'photo.png'
    Image.fromarray(photo).save(image)
    (tmp_path / 'none.png').write_text('text')
    done = run(file, tmp_path / 'none.png', image, '--out', tmp_path / 'out', '--json')
    assert done.returncode == 1 and 'none.png cannot be read as an image' in done.stderr
    (found,) = json.loads(done.stdout)[str(image)]['objects']
    assert (found['label'], found['score']) == ('star', 0.75)
    assert found['area'] == pytest.approx(30 * 40 * 431 / 92 * 300 / 64, rel=0.02)
    painted = np.asarray(Image.open(tmp_path / 'out' / 'photo.png'))
    assert painted.shape == photo.shape and (painted != photo).any()


def test_what_the_script_refuses(tool, photo, tmp_path):
    file = write_file(tmp_path / 'm.onnx', 'classification', canvas=(9, 9))
    model = tool.Model(file)
    for image, message in (
        (photo[..., 0], r'uint8 of shape \(300, 431\)'),
        (photo / 255, 'float64'),
        (photo[..., [0, 1, 2, 0]], r'\(300, 431, 4\)'),
        (photo[:0], r'\(0, 431, 3\)'),
    ):
        with pytest.raises(ValueError, match=f'the image is .*{message}.*; give RGB as uint8'):
            model(image)
    assert model(photo)['scores'].sum() == pytest.approx(1)
    with pytest.raises(ValueError, match='has 9x10 pixels and the file takes 9x9; export with'):
        model.run(photo[:9, :10])
    (tmp_path / 'text.onnx').write_text('text')
    other = onnx.load(file)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / 'other.onnx')
    for name, message in (('text', 'text.onnx'), ('other', 'export the whole model')):
        done = run(tmp_path / f'{name}.onnx', file)
        assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr
