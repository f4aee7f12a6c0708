"""The configs in the documentation build, with a user's own classes."""

import re

import pytest
from mmengine.config import Config

from tests.helpers.configs import ROOT, build_without_memory

PAGES = 'README.md', 'docs/training.md'
SNIPPETS = [
    pytest.param(text, id=f'{page}-{i}')
    for page in PAGES
    for i, text in enumerate(
        re.findall(r"```python\n(_base_ = '.*?)```", (ROOT / page).read_text(), re.S)
    )
]


def test_there_is_one_for_each_host():
    hosts = {re.search(r"_base_ = '.*?(in1k|coco|ade20k)", each.values[0])[1] for each in SNIPPETS}
    assert hosts == {'in1k', 'coco', 'ade20k'}


@pytest.mark.parametrize('text', SNIPPETS)
def test_builds(text, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(re.sub(r"_base_ = '(?:.*/)?", f"_base_ = '{ROOT}/configs/", text))
    cfg = Config.fromfile(path)
    model = build_without_memory(cfg)
    heads = [
        module
        for name, module in model.named_modules()
        if re.search('(?<!rpn_)head$', name) and hasattr(module, 'num_classes')
    ]
    (classes,) = {head.num_classes for head in heads}
    metainfo = cfg.train_dataloader.dataset.get('metainfo')
    assert classes == (len(metainfo.classes) if metainfo else cfg.data_preprocessor.num_classes)


TRAINING = (ROOT / 'docs/training.md').read_text()
OWN = dict(re.findall(r"### (\w+)\n[^#]*?```python\n(_base_ = '.*?)```", TRAINING, re.S))
SMALL = dict(re.findall(r'```python\n# (\w+)(.*?)```', TRAINING, re.S))


@pytest.mark.parametrize('task', ['Detection', 'Segmentation', 'Classification'])
def test_a_small_data_set(task, tmp_path):
    """60 images, as the page says: the warm-up ends early, and there are batches."""
    path = tmp_path / 'mine.py'
    text = OWN[task] + '#' + SMALL[task]
    path.write_text(re.sub(r"_base_ = '(?:.*/)?", f"_base_ = '{ROOT}/configs/", text))
    cfg = Config.fromfile(path)
    warm_up, decay = cfg.param_scheduler
    steps = 60 // cfg.train_dataloader.batch_size
    length = cfg.train_cfg.get('max_iters') or cfg.train_cfg.max_epochs * steps
    assert 0 < warm_up.end < length / 10
    assert not warm_up.by_epoch
    assert decay.end == cfg.train_cfg.get('max_iters', cfg.train_cfg.get('max_epochs'))
