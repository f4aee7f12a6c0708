"""An exported file reaches the model's figures, by the host's own metrics."""

import json

import pytest
import torch
from mmengine.config import Config

from mmbiformer.commands.runner import build_model
from mmbiformer.shapes import ShapesSpec, make_shapes
from tests.helpers.configs import write_toy
from tests.helpers.in_process import NUMBERS, run_tool

SLOW = pytest.mark.slow  # PyTorch's exporter takes half a minute
TASKS = {
    'sfpn_biformer': ('ade20k', ''),
    'maskrcnn_biformer': ('coco', "ann_file=root + 'annotations/instances_val.json'"),
    'biformer': ('imagenet', ''),
}


def figures(command, config, file, work):
    name = f'test{next(NUMBERS)}'
    run_tool(
        command, config, file, '--work-dir', work, '--cfg-options', f'experiment_name={name}',
        f'visualizer.name={name}',
    )  # fmt: skip
    (path,) = work.glob('*/*.json')
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    'task', [pytest.param(task, marks=SLOW if i else ()) for i, task in enumerate(TASKS)]
)
def test_reaches_the_figures_of_the_model(task, tmp_path):
    layout, evaluator = TASKS[task]
    size, objects = ((64, 64), (1, 1)) if layout == 'imagenet' else ((192, 160), (2, 4))
    spec = ShapesSpec(size=size, shape_size=(16, 50), objects=objects)
    make_shapes(tmp_path / 'data', 1, 7, spec=spec, progress=False, format=layout)
    config = write_toy(
        tmp_path,
        f'demo/{task}_t_shapes',
        f"""
root = '{tmp_path}/data/'
val_dataloader = dict(dataset=dict(data_root=root), **no_workers)
val_evaluator = dict({evaluator})
test_dataloader, test_evaluator = val_dataloader, val_evaluator
""",
    )
    torch.manual_seed(0)
    model = build_model(Config.fromfile(config))
    for name, weight in model.named_parameters():
        if name.rpartition('.')[0].endswith(('fc_cls', 'rpn_cls', 'conv_seg')):
            weight.data.normal_(0, 0.1)
    torch.save(dict(meta={}, state_dict=model.state_dict()), tmp_path / 'model.pth')
    out = tmp_path / 'model.onnx'
    shape = '--shape', size[1], size[0]
    run_tool('export_onnx', config, tmp_path / 'model.pth', '--out', out, *shape)
    theirs = figures('test', config, tmp_path / 'model.pth', tmp_path / 'model')
    ours = figures('test_onnx', config, out, tmp_path / 'file')
    shared = {key for key in theirs if 'time' not in key}
    assert len(shared) >= 1 and shared == {key for key in ours if 'time' not in key}
    scale = 1 if layout == 'coco' else 100
    for key in shared:
        assert ours[key] == pytest.approx(theirs[key], abs=0.001 * scale, nan_ok=True), key
