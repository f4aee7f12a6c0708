"""The preflight of a run."""

import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from mmbiformer.commands.preflight import check_data, claim_work_dir
from mmbiformer.errors import UserError

ROOT = Path(__file__).parents[2]


def config(**dataset):
    return Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset)))


COCO = dict(type='CocoDataset', data_root='coco', ann_file='a.json', data_prefix=dict(img='images'))


def test_missing_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'missing: coco/a\.json\n  missing: coco/images') as error:
        check_data(config(**COCO), ('train',))
    assert 'ln -s /path/to/your/data coco' in str(error.value)
    check_data(config(**COCO), ('val',))


@pytest.mark.parametrize(
    'change',
    [
        dict(data_prefix=dict(img='images', seg='nowhere')),
        dict(ann_file='nowhere.json'),
        dict(data_root='nowhere', ann_file='/dev/null'),
        dict(backend_args=dict(backend='petrel'), data_root='nowhere'),
        dict(data_root='s3://nowhere', ann_file='', data_prefix={}),
        dict(type='Virtual', data_root='nowhere'),
    ],
)
def test_what_the_host_may_not_read_is_not_missing(change, tmp_path, monkeypatch):
    """Only a data set of which nothing is there is missing; a user's own may need no files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'coco' / 'images').mkdir(parents=True)
    check_data(config(**{**COCO, **change}), ('train',))


@DATASETS.register_module()
class Virtual(BaseDataset):
    """A data set without files."""


@pytest.mark.parametrize('wrapper', ['RepeatDataset', 'ConcatDataset'])
def test_missing_data_inside_a_wrapper(wrapper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = dict(datasets=[COCO]) if wrapper == 'ConcatDataset' else dict(dataset=COCO)
    with pytest.raises(UserError, match='missing: coco'):
        check_data(config(type=wrapper, **inner), ('train',))


HOLD = """
import sys, time
from mmengine.config import Config
from mmbiformer.commands.preflight import claim_work_dir
claim_work_dir(Config(dict(work_dir=sys.argv[1], launcher='none')))
print('held', flush=True)
time.sleep(60)
"""


def test_one_training_a_folder(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), launcher='none'))
    other = subprocess.Popen([sys.executable, '-c', HOLD, tmp_path], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b'held\n'
        with pytest.raises(UserError, match=f'another training is under way .*process {other.pid}'):
            claim_work_dir(cfg)
    finally:
        other.kill()
        other.communicate()
    assert claim_work_dir(cfg) is None  # a killed process holds nothing
    assert claim_work_dir(cfg) is None  # nor is a process in its own way
