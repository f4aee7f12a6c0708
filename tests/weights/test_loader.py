"""The loaders that MMEngine uses for files and URLs."""

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from mmengine.config import Config
from mmengine.infer import BaseInferencer
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengines

from mmbiformer.errors import CheckpointError
from mmbiformer.weights.loader import load_from_http, load_from_local
from mmbiformer.weights.read import StandIn
from tests.helpers.goldens import Golden


def test_schemes():
    """Files and http(s) are ours; whatever else MMEngine knows stays its own."""
    ours = {'': load_from_local, 'http://': load_from_http, 'https://': load_from_http}
    schemes = CheckpointLoader._schemes
    assert {name: schemes[name] for name in ours} == ours
    others = {loader.__module__ for name, loader in schemes.items() if name not in ours}
    assert others == {'mmengine.runner.checkpoint'}
    for path, loader in (
        ('x.pth', load_from_local),
        ('https://x/y.pth', load_from_http),
        ('s3://x/y.pth', mmengines.load_from_ceph),
        ('torchvision://resnet50', mmengines.load_from_torchvision),
        ('openmmlab://x', mmengines.load_from_openmmlab),
    ):
        assert CheckpointLoader._get_checkpoint_loader(path) is loader


def test_released_file(tmp_path):
    """Under our names, with `meta`, where MMSegmentation looks for classes."""
    weights = Golden('biformer_tiny_cls').released()
    for meta, expected in ((dict(CLASSES=('a',)), dict(CLASSES=('a',))), (3, {}), (None, {})):
        torch.save(dict(meta=meta, model=weights, epoch=299), tmp_path / 'x.pth')
        loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))
        assert loaded.keys() == {'meta', 'state_dict'} and loaded['meta'] == expected
        assert torch.equal(loaded['state_dict']['head.fc.bias'], weights['head.bias'])


@pytest.mark.parametrize(
    'content', [{'a': torch.ones(1)}, [1, 2], {'model': {'a': 1}}, {(1, 2): 3}]
)
def test_files_of_others(content, tmp_path):
    """They are left as they are; MMEngine looks for weights under `state_dict` only."""
    torch.save(content, tmp_path / 'x.pth')
    loaded = load_from_local(str(tmp_path / 'x.pth'))
    if isinstance(content, dict) and 'model' in content:
        assert loaded.pop('state_dict') is loaded['model']
    assert loaded == content


def test_missing_file(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save([3], tmp_path / 'x.pth')
    assert load_from_local('~/x.pth') == [3]
    with pytest.raises(CheckpointError, match=r'none\.pth cannot be opened: No such file .* path'):
        load_from_local('none.pth')


def test_configs_in_checkpoints_are_not_run(tmp_path, monkeypatch):
    """A config is Python. MMEngine's runners and inferencers would run it."""
    monkeypatch.chdir(tmp_path)
    code = "open('canary', 'w').close()\nmodel = dict(type='Linear')\n"
    Config.fromstring(code, file_format='.py')
    (tmp_path / 'canary').unlink()  # this is how it would be run
    hub = dict(runtime_info=dict(cfg=code, iter=3), log_scalars={}, resumed_keys={})
    meta = dict(config=code, cfg=code, epoch=1)
    torch.save(dict(meta=meta, message_hub=hub, state_dict={'a': torch.ones(1)}), 'x.pth')
    loaded = CheckpointLoader.load_checkpoint('x.pth', map_location='cpu')
    assert loaded['meta'] == dict(epoch=1)
    assert loaded['message_hub']['runtime_info'] == dict(iter=3)
    with pytest.raises(ValueError, match='Cannot find the config in the checkpoint'):
        BaseInferencer._init_model(None, Config(), 'x.pth')
    assert not (tmp_path / 'canary').exists()


# ---- URLs.


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that is served, and its address."""
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setattr(SimpleHTTPRequestHandler, 'log_message', lambda *args: None)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever).start()
        yield tmp_path, f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


def test_download_is_kept(server):
    folder, address = server
    torch.save(dict(state_dict=dict(a=torch.ones(2)), function=load_from_http), folder / 'a.pth')
    for _ in range(2):
        loaded = CheckpointLoader.load_checkpoint(f'{address}/a.pth')
        assert torch.equal(loaded['state_dict']['a'], torch.ones(2))
        assert loaded['function'] is StandIn
        (folder / 'a.pth').unlink(missing_ok=True)
    (kept,) = (folder / 'hub/checkpoints').iterdir()
    kept.write_bytes(kept.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=f'{address}/a.pth: .*truncated'):
        CheckpointLoader.load_checkpoint(f'{address}/a.pth')
    assert kept.exists()  # it may be the user's own


@pytest.mark.parametrize(
    ('url', 'reason'),
    [
        ('{}/none.pth', '404'),
        ('http://127.0.0.1:9/a.pth', 'refused'),
        ('http://a b/c.pth', 'Check the address'),
        ('http://[::1/c.pth', 'Check the address'),
    ],
)
def test_failed_download(url, reason, server):
    folder, address = server
    with pytest.raises(CheckpointError, match=rf'cannot be downloaded: .*{reason}') as info:
        CheckpointLoader.load_checkpoint(url.format(address))
    assert url.format(address) in str(info.value) and info.value.__cause__ is not None
    assert not [*(folder / 'hub/checkpoints').glob('*.pth')]


def test_download_of_a_page_is_not_kept(server):
    """Once the server has the file, it is loaded."""
    folder, address = server
    (folder / 'a.pth').write_text('<!DOCTYPE html><html>Too many requests</html>')
    with pytest.raises(CheckpointError, match=rf'{address}/a\.pth: .*it is a web page'):
        CheckpointLoader.load_checkpoint(f'{address}/a.pth')
    torch.save(dict(state_dict=dict(a=torch.ones(2))), folder / 'a.pth')
    assert CheckpointLoader.load_checkpoint(f'{address}/a.pth')['state_dict']['a'].sum() == 2
