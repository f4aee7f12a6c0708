"""Static quantization of an exported file."""

import importlib.util
import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.helpers.configs import ROOT
from tests.helpers.in_process import run_tool

RNG = np.random.default_rng(0)


def write_file(path):
    """A classifier: one convolution, and the mean of each channel."""
    weight = RNG.normal(size=(64, 3, 7, 7)).astype(np.float32)
    nodes = [
        helper.make_node('Cast', ['images'], ['floats'], to=TensorProto.FLOAT),
        helper.make_node('Transpose', ['floats'], ['x'], perm=[0, 3, 1, 2]),
        helper.make_node('Conv', ['x', 'weight'], ['y'], kernel_shape=[7, 7]),
        helper.make_node('ReduceMean', ['y'], ['logits'], axes=[2, 3], keepdims=0),
    ]
    images = helper.make_tensor_value_info('images', TensorProto.UINT8, ['batch', 32, 32, 3])
    logits = helper.make_tensor_value_info('logits', TensorProto.FLOAT, ['batch', 64])
    initializers = [numpy_helper.from_array(weight, 'weight')]
    graph = helper.make_graph(nodes, 'graph', [images], [logits], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    facts = dict(task='classification', canvas=[32, 32], resize=[], classes=[])
    model.metadata_props.add(key='mmbiformer', value=json.dumps(facts))
    onnx.save(model, path)


def test_quantized_file_runs_as_the_other(tmp_path):
    spec = importlib.util.spec_from_file_location('run_onnx', ROOT / 'tools/deployment/run_onnx.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Model = module.Model

    write_file(tmp_path / 'model.onnx')
    pictures = []
    for i in range(4):
        pictures.append(tmp_path / f'{i}.png')
        pixels = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures[-1])
    out = tmp_path / 'int8.onnx'
    printed = run_tool('quantize_onnx', tmp_path / 'model.onnx', *pictures, '--out', out)
    assert f'wrote {out}' in printed
    kinds = [each.data_type for each in onnx.load(out).graph.initializer if len(each.dims) == 4]
    assert kinds == [TensorProto.INT8]
    whole, small = (Model(path) for path in (tmp_path / 'model.onnx', out))
    assert small.facts == whole.facts
    image = whole.prepare(np.asarray(Image.open(pictures[0])))
    logits = [model.run(image)['logits'] for model in (whole, small)]
    error = np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()
    assert 0 < error < 0.02
