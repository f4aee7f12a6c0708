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
