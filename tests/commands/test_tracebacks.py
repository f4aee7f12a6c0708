"""A mistake in a user's own code shows the user's file and line, whatever runs it."""

import re

import pytest

from tests.helpers.in_process import run_tool, train
from tests.helpers.toy_training import config_text

# Where each mistake is: the class's base, the method with the mistake, and how a config uses it.
OWN_CODE = """
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS

from tests.helpers.toy_training import ToyDataset, ToyMetric, ToyModel


@DATASETS.register_module(force=True)
class Piped(ToyDataset):
    prepare_data = BaseDataset.prepare_data


@REGISTRY.register_module(force=True)
class Own(BASE):
    def METHOD:
        if 'large' not in {'small': 1}:
            raise ValueError('need at least one array to concatenate')  # here
"""
CASES = {
    'data set': (
        ('DATASETS', 'ToyDataset', 'load_data_list(self)'),
        "train_dataloader['dataset'] = dict(type='Own')",
    ),
    'images': (
        ('DATASETS', 'ToyDataset', 'prepare_data(self, idx)'),
        "train_dataloader['dataset'] = dict(type='Own')",
    ),
    'transform': (
        ('TRANSFORMS', 'object', '__call__(self, results)'),
        "train_dataloader['dataset'] = dict(type='Piped', pipeline=[dict(type='Own')])",
    ),
    'hook': (
        ('HOOKS', 'Hook', 'after_train_iter(self, runner, batch_idx, data_batch, outputs)'),
        "custom_hooks = [dict(type='Own')]",
    ),
    'metric': (
        ('METRICS', 'ToyMetric', 'process(self, data_batch, data_samples)'),
        "val_evaluator['type'] = 'Own'",
    ),
    'metric at the end': (
        ('METRICS', 'ToyMetric', 'compute_metrics(self, results)'),
        "val_evaluator['type'] = 'Own'; train_cfg = dict(by_epoch=True, max_epochs=1)",
    ),
    'model': (
        ('MODELS', 'ToyModel', 'forward(self, inputs, number, mode=None)'),
        "model['type'] = 'Own'",
    ),
    'part of a model': (
        ('MODELS', 'BaseModel', 'forward(self, x)'),
        "model['backbone'] = dict(type='Own')",
    ),
    'model that is not built': (
        ('MODELS', 'ToyModel', '__init__(self, backbone, data_preprocessor=None)'),
        "model['type'] = 'Own'",
    ),
}


def write(folder, case):
    """Write a user's module with one mistake, and a config that uses it.

    Returns the config, the module and the line of the mistake.
    """
    (registry, base, method), use = CASES[case]
    name = re.sub(r'\W', '_', folder.name)  # Python imports a name once
    text = OWN_CODE.replace('REGISTRY', registry).replace('BASE', base).replace('METHOD', method)
    module, config = folder / f'{name}.py', folder / 'mine.py'
    module.write_text(text)
    config.write_text(
        f"{config_text(workers=0)}\ncustom_imports['imports'].append('{name}')\n{use}\n"
    )
    return config, module, 1 + text[: text.index('# here')].count('\n')


def test_type_error(tmp_path, monkeypatch):
    """MMEngine hides where a TypeError in a hook comes from."""
    monkeypatch.syspath_prepend(tmp_path)
    config, module, line = write(tmp_path, 'model')
    module.write_text(module.read_text().replace("raise ValueError('", "raise TypeError('"))
    out = train(config, tmp_path / 'work', status=1)
    assert f'File "{module}", line {line}' in out
    assert 'TypeError: need at least one array to concatenate' in out


@pytest.mark.parametrize(
    ('case', 'workers'), [*((case, 0) for case in CASES), ('images', 1), ('transform', 1)]
)
def test_own_code(case, workers, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    config, module, line = write(tmp_path, case)
    options = ('--cfg-options', f'train_dataloader.num_workers={workers}')
    out = train(config, tmp_path / 'work', *options, status=1)
    assert f'File "{module}", line {line}' in out
    assert 'ValueError: need at least one array to concatenate' in out
    assert out.startswith('Traceback') or '\nTraceback' in out
    assert 'hint: ' not in out


def test_config(tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text("sizes = {'small': 1}\n\nbatch = sizes['large']\n")
    out = run_tool('print_config', config, status=1)
    assert f'File "{config}", line 3' in out
    assert out.rstrip().endswith("KeyError: 'large'")


def test_base_of_a_config(tmp_path):
    (tmp_path / 'base.py').write_text('a = 1\nb = unknown\n')
    (tmp_path / 'mine.py').write_text("_base_ = 'base.py'\n")
    out = run_tool('print_config', tmp_path / 'mine.py', status=1)
    assert f'File "{tmp_path / "base.py"}", line 2' in out
    assert 'NameError' in out


def test_unknown_type(tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text(config_text() + "\nval_evaluator = dict(type='ToyMetrics')\n")
    out = train(config, tmp_path / 'work', status=1)
    assert 'Traceback' in out
    assert 'ToyMetrics is not in the' in out
