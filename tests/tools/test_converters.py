"""The commands that write checkpoints: convert and publish."""

import hashlib

import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmbiformer.weights.read import read_checkpoint
from tests.helpers.backbones import toy
from tests.helpers.goldens import Golden
from tests.helpers.in_process import run_tool


def test_convert(tmp_path):
    """From the authors' names to ours, to safetensors and back."""
    torch.save(dict(model=Golden('biformer_tiny_cls').released()), tmp_path / 'authors.pth')
    for source, target in (('authors.pth', 'a.safetensors'), ('a.safetensors', 'new/b.pth')):
        printed = run_tool('convert_checkpoint', tmp_path / source, tmp_path / target)
        assert f'tensors to {tmp_path / target}' in printed
    there, back = (read_checkpoint(tmp_path / name) for name in ('a.safetensors', 'new/b.pth'))
    assert back['meta'] == dict(converted_from='a.safetensors')
    assert there.keys() == back['state_dict'].keys() and 'backbone.norm.weight' in there
    assert all(torch.equal(there[name], value) for name, value in back['state_dict'].items())
    assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == ['b.pth']


def test_tensors_that_safetensors_refuses(tmp_path):
    """Those that share memory, and those that are not contiguous."""
    shared = torch.randn(3, 4)
    weights = dict(a=shared, b=shared, c=shared.t(), d=shared[:, 1:])
    torch.save({**weights, 'steps': 3}, tmp_path / 'x.pth')
    run_tool('convert_checkpoint', tmp_path / 'x.pth', tmp_path / 'x.safetensors')
    found = read_checkpoint(tmp_path / 'x.safetensors')
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ('source', 'target', 'message'),
    [
        ('x.pth', 'x.pth', 'exists already; remove it or choose another name'),
        ('x.pth', 'y.onnx', r'give DST a name in .pth or .safetensors'),
        ('none.pth', 'y.pth', 'none.pth cannot be opened: No such file'),
        ('page.pth', 'y.pth', 'page.pth cannot be read: it is a web page'),
        ('list.pth', 'y.pth', 'holds a list, not weights by name'),
    ],
)
def test_convert_refuses(source, target, message, tmp_path):
    torch.save({'a': torch.ones(1)}, tmp_path / 'x.pth')
    torch.save([1], tmp_path / 'list.pth')
    (tmp_path / 'page.pth').write_text('<html>Not found</html>')
    before = sorted(tmp_path.iterdir())
    printed = run_tool('convert_checkpoint', tmp_path / source, tmp_path / target, status=2)
    assert message in printed and 'Traceback' not in printed
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of a training with averaged weights, and its weights."""
    weights = toy().state_dict()
    averages = {f'module.{name}': value + 1 for name, value in weights.items()}
    checkpoint = dict(
        meta=dict(epoch=2, cfg='…', hook_msgs={}, experiment_name='mine', time='now'),
        state_dict=weights,
        ema_state_dict={**averages, 'steps': 3},
        ema_at_side=True,
        optimizer=dict(state=weights),
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1], [1]))),
    )
    torch.save(checkpoint, tmp_path / 'epoch_2.pth')
    return weights


@pytest.mark.parametrize('options', [[], ['--ema']])
def test_publish(options, trained, tmp_path):
    target = tmp_path / 'new' / 'biformer.pth'
    run_tool('publish_model', tmp_path / 'epoch_2.pth', target, *options)
    (path,) = target.parent.iterdir()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f'biformer-{digest[:8]}.pth'
    published = torch.load(path, weights_only=True)
    assert published.keys() == {'meta', 'state_dict'}
    assert published['meta'] == dict(epoch=2, cfg='…')
    assert published['state_dict'].keys() == trained.keys()
    for name, value in published['state_dict'].items():
        assert torch.equal(value, trained[name] + len(options))


@pytest.mark.parametrize(
    ('change', 'target', 'message'),
    [
        (dict(ema_at_side=False), 'y.pth', '--ema: MMEngine'),
        (dict(ema_state_dict=None), 'y.pth', 'was trained without EMA'),
        (dict(meta=None), 'y.pth', 'is not a checkpoint of a training'),
        (dict(), 'y.zip', 'give DST a name in .pth'),
    ],
)
def test_publish_refuses(change, target, message, trained, tmp_path):
    path = tmp_path / 'epoch_2.pth'
    checkpoint = {**read_checkpoint(path), **change}
    torch.save({name: value for name, value in checkpoint.items() if value is not None}, path)
    printed = run_tool('publish_model', path, tmp_path / target, '--ema', status=2)
    assert message in printed and 'Traceback' not in printed
    assert [each.name for each in tmp_path.iterdir()] == ['epoch_2.pth']
