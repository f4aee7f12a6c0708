"""Whole models: normalization, network and post-processing in one graph, as the hosts have them."""

import copy
import importlib.util
import json

import numpy as np
import onnx
import pytest
import torch
from mmengine.registry import init_default_scope

pytest.importorskip('mmdet')

from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from onnxruntime import InferenceSession
from onnxruntime.quantization import quantize_dynamic

from mmbiformer.commands.runner import build_model
from mmbiformer.errors import UserError
from mmbiformer.export.onnx import write_onnx
from mmbiformer.export.whole import WholeModel, describe, trace_whole
from tests.helpers.configs import ROOT, TOY, load

SLOW = pytest.mark.slow  # PyTorch's exporter takes half a minute
CANVAS = 96, 128
MODELS = {
    'maskrcnn': ('demo/maskrcnn_biformer_t_shapes', DetDataSample),
    'retinanet': ('demo/retinanet_biformer_t_shapes', DetDataSample),
    'sfpn': ('demo/sfpn_biformer_t_shapes', SegDataSample),
    'upernet': ('demo/upernet_biformer_t_shapes', SegDataSample),
    'sfpn_bixt': ('demo/sfpn_bixt_ti_shapes', SegDataSample),
    'classification': ('demo/biformer_t_shapes', DataSample),
}


def toy(name):
    """A model with few blocks whose random weights detect something, and its config."""
    cfg = load(MODELS[name][0])
    if name == 'sfpn_bixt':
        cfg.model.backbone.update(arch=dict(dim=192, depth=3, stride=8), out_indices=(0, 1))
        cfg.model.neck = dict(type='FPN', in_channels=[192] * 2, out_channels=96, num_outs=4)
    else:
        cfg.model.backbone.arch = {key: x for key, x in TOY.items() if key != '_delete_'}
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for key, weight in model.named_parameters():
        if key.endswith(
            ('retina_cls.weight', 'fc_cls.weight', 'rpn_cls.weight', 'conv_seg.weight')
        ):
            weight.data.normal_(0, 0.1)
        if key.endswith('retina_cls.bias'):
            weight.data.fill_(-2)
    return model, cfg


def whole(name):
    model, cfg = toy(name)
    settings = {**cfg.get('data_preprocessor', {}), **cfg.model.get('data_preprocessor', {})}
    net = WholeModel(model, settings, CANVAS)
    net.metadata['mmbiformer'] = describe(net, cfg, ['a', 'b'])
    return net, cfg


def picture(height, width, seed=0):
    """A smooth image."""
    noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(noise, (height, width), mode='bicubic')
    return (255 * image.clamp(0, 1)).to(torch.uint8)[0].permute(1, 2, 0)[None]


def predict(name, model, images):
    """The host's prediction; its loaders give BGR."""
    init_default_scope(load(MODELS[name][0]).default_scope)
    sample = MODELS[name][1]()
    size = tuple(images.shape[1:3])
    sample.set_metainfo(dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_id=0))
    inputs = [images[0].permute(2, 0, 1).flip(0)]
    inputs = torch.stack(inputs) if name == 'classification' else inputs
    # A canvas is what the host pads to.
    return model.test_step(dict(inputs=inputs, data_samples=[sample]))[0]


def assert_as_host(name, outputs, sample):
    if name == 'classification':
        torch.testing.assert_close(outputs[0].softmax(1)[0], sample.pred_score)
    elif 'pred_sem_seg' in sample:
        theirs = sample.pred_sem_seg.data
        assert len(theirs.unique()) > 1
        assert (outputs[0] != theirs).float().mean() <= 1e-4
    else:
        theirs = sample.pred_instances
        boxes, scores, labels = outputs[:3]
        assert len(scores) == len(theirs) > 5
        torch.testing.assert_close(scores, theirs.scores, atol=1e-4, rtol=0)
        # Boxes with scores that are equal but for rounding may change places.
        same = bbox_overlaps(boxes, theirs.bboxes, is_aligned=True) > 0.999
        same &= labels == theirs.labels
        near = (scores.diff().abs() < 1e-5).nonzero()[:, 0]
        assert {*(~same).nonzero()[:, 0].tolist()} <= {*near.tolist(), *(near + 1).tolist()}
        assert same.float().mean() > 0.8


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_predicts_as_the_host(name):
    model, _ = toy(name)
    net, _ = whole(name)
    images = picture(*CANVAS)
    sample = predict(name, model, images)
    outputs = net(images)
    assert_as_host(name, outputs, sample)
    if name == 'maskrcnn':
        theirs, (boxes, _, labels, masks) = sample.pred_instances, outputs
        assert masks.shape == (len(boxes), 28, 28)
        pasted = run_onnx().paste(masks.numpy(), boxes.numpy(), *CANVAS, 0.5)
        same = (labels == theirs.labels) & (boxes - theirs.bboxes).abs().amax(1).lt(1e-3)
        assert same.sum() > 5 and pasted[same].any()
        assert (torch.from_numpy(pasted)[same] != theirs.masks[same]).float().mean() < 1e-3


def run_onnx():
    """The runner of exported files, which is a script."""
    path = ROOT / 'tools' / 'deployment' / 'run_onnx.py'
    spec = importlib.util.spec_from_file_location('run_onnx', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('name', ['maskrcnn', 'sfpn'])
@torch.no_grad()
def test_smaller_images(name):
    """The host pads at the right and bottom, too."""
    net, _ = whole(name)
    model, _ = toy(name)
    if name == 'sfpn':
        model.data_preprocessor.size = None
        model.data_preprocessor.test_cfg = dict(size=CANVAS)
    else:
        model.data_preprocessor.pad_size_divisor = CANVAS[1]  # to 128x128
        net.images.canvas = net.predict.canvas = (128, 128)
    images = picture(83, 101)
    assert_as_host(name, net(images), predict(name, model, images))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Makes a file once."""
    made = {}

    def make(name):
        if name not in made:
            net, _ = whole(name)
            path = tmp_path_factory.mktemp('whole') / f'{name}.onnx'
            write_onnx(trace_whole(net), path, net)
            made[name] = net, path
        return made[name]

    return make


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=() if name == 'maskrcnn' else SLOW) for name in MODELS]
)
@torch.no_grad()
def test_file_equals_pytorch(name, exported):
    net, path = exported(name)
    onnx.checker.check_model(onnx.load(path))
    session = InferenceSession(str(path), providers=['CPUExecutionProvider'])
    assert [each.name for each in session.get_outputs()] == [*net.output_names]
    sizes = [CANVAS] if name == 'classification' else [CANVAS, (83, 101), (17, 128), (96, 31)]
    for seed, size in enumerate(sizes):
        images = picture(*size, seed)
        found = [torch.from_numpy(x) for x in session.run(None, dict(images=images.numpy()))]
        for a, b in zip(found, net(images), strict=True):
            assert a.shape == b.shape
            if a.is_floating_point():
                assert (a - b).abs().max() <= 1e-4 * b.abs().max()
            else:
                assert (a != b).float().mean() <= 1e-4


def test_what_the_file_says(exported):
    _, path = exported('maskrcnn')
    facts = json.loads(onnx.load(path).metadata_props[0].value)
    assert facts == dict(
        task='detection',
        input='uint8, RGB, (batch, height, width, 3)',
        canvas=[*CANVAS],
        resize=[dict(type='Resize', scale=[192, 160], keep_ratio=True)],
        classes=['a', 'b'],
        mask_threshold=0.5,
    )


def test_can_be_quantized(exported, tmp_path):
    """Shapes of weights are left out, because quantization changes them."""
    _, path = exported('maskrcnn')
    quantize_dynamic(path, tmp_path / 'int8.onnx', op_types_to_quantize=['MatMul', 'Gemm'])
    session = InferenceSession(str(tmp_path / 'int8.onnx'), providers=['CPUExecutionProvider'])
    boxes, *_ = session.run(None, dict(images=picture(*CANVAS).numpy()))
    assert np.isfinite(boxes).all()
    assert (tmp_path / 'int8.onnx').stat().st_size < 0.7 * path.stat().st_size


def test_no_box(exported):
    """A black image on which nothing reaches the threshold."""
    net, path = exported('maskrcnn')
    session = InferenceSession(str(path), providers=['CPUExecutionProvider'])
    model = onnx.load(path)
    (threshold,) = (
        each
        for each in model.graph.initializer
        if onnx.numpy_helper.to_array(each).size == 1
        and float(onnx.numpy_helper.to_array(each))
        == pytest.approx(net.model.test_cfg.rcnn.score_thr)
    )
    threshold.CopyFrom(onnx.numpy_helper.from_array(np.float32(1.0), threshold.name))
    session = InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    found = session.run(None, dict(images=picture(*CANVAS).numpy()))
    assert [x.shape for x in found] == [(0, 4), (0,), (0,), (0, 28, 28)]


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        (
            'retinanet',
            dict(bbox_head=dict(type='ATSSHead')),
            r'post-processing of .*ATSSHead is not',
        ),
        ('retinanet', dict(test_cfg=dict(nms=dict(type='soft_nms'))), "type 'soft_nms' is not"),
        (
            'retinanet',
            dict(bbox_head=dict(bbox_coder=dict(clip_border=False))),
            'clip_border=True',
        ),
        ('sfpn', dict(test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(32, 32))), 'windows'),
    ],
)
def test_refused(name, change, message):
    cfg = copy.deepcopy(load(MODELS[name][0]))
    cfg.model.backbone.arch = {key: x for key, x in TOY.items() if key != '_delete_'}
    cfg.merge_from_dict(dict(model=change))
    if 'ATSSHead' in message:
        for key in ('loss_bbox', 'bbox_coder', 'anchor_generator'):
            cfg.model.bbox_head.pop(key, None)
        cfg.model.bbox_head.anchor_generator = dict(
            type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1,
            strides=[8, 16, 32, 64, 128],
        )  # fmt: skip
    model = build_model(cfg)
    with pytest.raises(UserError, match=message):
        WholeModel(model, cfg.model.data_preprocessor, CANVAS)


class Bessel(torch.nn.Module):
    """An activation that ONNX does not have."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_operator_that_onnx_lacks(tmp_path):
    net, _ = whole('classification')
    net.model.backbone.norm = Bessel()
    with pytest.raises(UserError, match=r'model\.backbone\.norm \(.*Bessel\) uses .*bessel_j0'):
        write_onnx(trace_whole(net), tmp_path / 'a.onnx', net)
    assert not any(tmp_path.iterdir())
