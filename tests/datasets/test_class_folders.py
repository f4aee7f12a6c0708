"""ImageNet-V2 and -C: labels by the names of folders."""

import pytest
from PIL import Image

from mmbiformer.errors import UserError
from tests.helpers.configs import load

pytest.importorskip('mmpretrain')


def make(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new('RGB', (300, 260)).save(root / name / 'a.jpeg')
    return root


def labels(dataset):
    return {
        info['img_path'].split('/')[-2]: info['gt_label']
        for info in map(dataset.get_data_info, range(len(dataset)))
    }


def build(root, **options):
    from mmpretrain.registry import DATASETS

    load('biformer_s_in1k')  # sets the scope
    return DATASETS.build(dict(type='mmbiformer.ClassFolders', data_root=str(root), **options))


@pytest.mark.parametrize('name', ['biformer_t_in1kv2', 'biformer_s_in1kv2', 'biformer_b_in1kv2'])
def test_imagenet_v2(name, tmp_path):
    """Folder 10 is class 10, and folders that lack others stay what they are."""
    from mmpretrain.registry import DATASETS

    cfg = load(name)
    dataset = cfg.test_dataloader.dataset
    dataset.data_root = str(make(tmp_path, *map(str, (0, 1, 2, 9, 10, 11, 100, 999))))
    found = DATASETS.build(dataset)
    assert labels(found) == {str(i): i for i in (0, 1, 2, 9, 10, 11, 100, 999)}
    sample = found[4]
    assert sample['inputs'].shape == (3, 224, 224)
    assert len(found.metainfo['classes']) == 1000
    plain = load(name.replace('v2', ''))
    assert cfg.test_dataloader.dataset.pipeline == plain.test_dataloader.dataset.pipeline
    assert cfg.model == plain.model


def test_wordnet_names(tmp_path):
    """The first, one in the middle and the last in the order of ImageNet's classes."""
    names = dict(n01440764=0, n02123045=281, n15075141=999)
    dataset = build(make(tmp_path, *names))
    assert labels(dataset) == names
    assert 'tabby' in dataset.metainfo['classes'][281]


def test_names_of_own_classes(tmp_path):
    dataset = build(make(tmp_path, 'ring', 'cross'), classes=['star', 'ring', 'disc', 'cross'])
    assert labels(dataset) == dict(ring=1, cross=3)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r'/1000 is no class'):
        build(make(tmp_path / 'a', '3', '1000'))
    with pytest.raises(UserError, match='has no images'):
        (tmp_path / 'b/3').mkdir(parents=True)
        build(tmp_path / 'b')
