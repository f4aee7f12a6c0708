"""The shipped configs: those that the metafiles list, and the demo's.

A user's own files in configs/ are none of them.
"""

import copy
import functools
from pathlib import Path

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).parents[2]
TASKS = 'biformer', 'maskrcnn_biformer', 'retinanet_biformer', 'sfpn_biformer', 'upernet_biformer'
DEMOS = [f'demo/{task}_t_shapes' for task in TASKS]
# An arch with the widths of T and S, which takes next to no time.
TOY = dict(_delete_=True, depths=(1, 1, 1, 1), embed_dims=(64, 128, 256, 512), mlp_ratio=1)
NO_WORKERS = dict(num_workers=0, persistent_workers=False)


def metafiles():
    """The content of the metafiles."""
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    return [yaml.safe_load((ROOT / path).read_text()) for path in index['Import']]


ENTRIES = {
    entry['Config'].removeprefix('configs/').removesuffix('.py'): entry
    for file in metafiles()
    for entry in file['Models']
}
BIXT = [name for name in ENTRIES if 'bixt_' in name]
IMAGENET_V2 = [name for name in ENTRIES if name.endswith('in1kv2')]  # nothing but another test set
RECIPES = [name for name in ENTRIES if name not in (*BIXT, *IMAGENET_V2)]  # of the pyramids


@functools.cache
def _read(name):
    return Config.fromfile(ROOT / f'configs/{name}.py')


def load(name):
    """A config, which may be changed."""
    cfg = copy.deepcopy(_read(name))
    init_default_scope(cfg.default_scope)
    return cfg


def build_without_memory(cfg):
    """The model of a config on the meta device."""
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


@functools.cache
def model_of(name):
    """The model of a shipped config on the meta device; not to be changed."""
    return build_without_memory(load(name))


def write_toy(folder, name, changes=''):
    """Write a config that inherits a shipped one, with a toy backbone; give its path."""
    config = folder / f'{Path(name).stem}.py'
    config.write_text(
        f"_base_ = '{ROOT}/configs/{name}.py'\n"
        f'model = dict(backbone=dict(arch={TOY}))\n'
        f'no_workers = {NO_WORKERS}\n{changes}'
    )
    return config


def write_toy_maskrcnn(folder, changes=''):
    """As :func:`write_toy`, for Mask R-CNN on the shapes in the folder's data/."""
    return write_toy(
        folder,
        'demo/maskrcnn_biformer_t_shapes',
        f"""data_root = '{folder}/data/'
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root), **no_workers)
val_dataloader = dict(dataset=dict(data_root=data_root), **no_workers)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
{changes}""",
    )
