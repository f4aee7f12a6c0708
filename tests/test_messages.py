"""Bad input of every kind and the message it gets: what was given, what is needed, what to do.

Commands end with status 2, one message on stderr, no traceback and nothing written.
"""

import errno
import runpy
import struct
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from toy_training import config_text

from mmbiformer.engine.checks import CommandError
from mmbiformer.engine.command_line import run_command
from mmbiformer.layers import BiLevelRoutingAttention, FullAttention
from mmbiformer.models import BiFormer
from mmbiformer.ops import route_regions, routed_attention

ROOT = Path(__file__).parent.parent
COCO = f'{ROOT}/configs/maskrcnn_biformer_s_coco.py'
TOY = dict(depths=(1, 1), embed_dims=(32, 64), mlp_ratio=1, topks=(1, 2))


def net(**kwargs):
    return BiFormer(**{**dict(arch=TOY, region_grid=4), **kwargs})


def attend(q=(1, 4, 4, 8), k=(1, 4, 4, 8), routes=(1, 4, 2), region=(2, 2), heads=2, **kwargs):
    q, k = torch.zeros(q), torch.zeros(k)
    routes = torch.zeros(routes, dtype=torch.int64)
    return routed_attention(q, k, k, routes, num_heads=heads, region_size=region, **kwargs)


CALLS = {
    'arch': (lambda: net(arch='large'), "arch='large' is unknown; choose one of", "'small'"),
    'arch dict': (lambda: net(arch=dict(depths=(1,))), 'needs', 'embed_dims', "got ['depths']"),
    'widths': (lambda: net(arch=dict(TOY, embed_dims=(30, 64))), '(30, 64)', 'multiples of 32'),
    'stages': (lambda: net(arch=dict(TOY, depths=(1,))), 'one entry a stage', '(1,)'),
    'layout': (lambda: net(arch=dict(TOY, layout='swan')), "layout='swan' must be 'conv' or"),
    'grid': (lambda: net(region_grid=7.5), 'region_grid=7.5 must be a positive int or a pair'),
    'grid of zero': (lambda: net(region_grid=0), 'region_grid=0 must be a positive int'),
    'top-k': (lambda: net(region_grid=1), 'topk=2', '1 regions', 'a finer region_grid'),
    'padding': (lambda: net(padding='zeros'), "padding='zeros' is unknown; choose one of"),
    'out_indices': (lambda: net(out_indices=(0, 4)), 'out_indices=(0, 4)', 'from 0 to 1'),
    'falling': (lambda: net(out_indices=(1, 0)), 'out_indices=(1, 0) must be rising'),
    'final_norm': (lambda: net(final_norm=True, out_indices=(0,)), 'must be (1,)', 'leave final'),
    'drop_path': (lambda: net(drop_path_rate=1), 'drop_path_rate=1 must lie in [0, 1)'),
    'frozen': (lambda: net(frozen_stages=3), 'frozen_stages=3', 'between -1 and the 2 stages'),
    'no batch': (lambda: net()(torch.zeros(3, 32, 32)), '(B, 3, H, W)', 'got (3, 32, 32)'),
    'channels': (lambda: net()(torch.zeros(1, 1, 32, 32)), '(B, 3, H, W)', 'got (1, 1, 32, 32)'),
    'empty image': (lambda: net()(torch.zeros(1, 3, 0, 5)), '0x5 pixels', 'at least 1x1', 'resize'),
    'small image': (
        lambda: net(arch=dict(TOY, layout='swin'))(torch.zeros(1, 3, 9, 7)),
        'images of 9x7 pixels are too small', 'at least 8x8', 'resize or pad',
    ),
    'small map': (
        lambda: net(padding='projected')(torch.zeros(1, 3, 30, 9)),
        'images of 30x9 pixels are too small', 'at least 25x25', 'resize or pad',
    ),
    'heads': (lambda: BiLevelRoutingAttention(30, 4, 1), 'dim=30 must be', 'of num_heads=4'),
    'full heads': (lambda: FullAttention(30), 'dim=30 must be a multiple of num_heads=8'),
    'lepe': (lambda: BiLevelRoutingAttention(32, 1, 1, lepe_kernel=4), 'lepe_kernel=4', 'odd'),
    'lepe source': (lambda: FullAttention(32, lepe_source='q'), "lepe_source='q' must be 'input'"),
    'grid of map': (
        lambda: BiLevelRoutingAttention(32, 1, 1, padding='projected')(torch.zeros(1, 3, 9, 32)),
        '3x9 map', '7x7 region grid', 'a larger input',
    ),
    'routes': (lambda: attend(routes=(1, 3, 2)), 'int64 (B, Rq, k) = (1, 4, k >= 1)', '(1, 3, 2)'),
    'maps': (lambda: attend(q=(4, 4, 8)), 'must be maps (B, H, W, C)', '(4, 4, 8)'),
    'other keys': (lambda: attend(k=(2, 4, 4, 8)), 'share batch and channels', '(2, 4, 4, 8)'),
    'head count': (lambda: attend(heads=3), 'multiples of num_heads=3'),
    'region': (lambda: attend(region=(0, 2)), 'region_size=(0, 2)', 'must be positive'),
    'backend': (lambda: attend(backend='fast'), "backend='fast' is unknown; choose one of"),
    'top-k of routes': (
        lambda: route_regions(torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 8), 5, (2, 2)),
        'topk=5', '4 regions (2x2)', 'choose 1 <= topk <= 4',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', CALLS)
def test_calls(name):
    function, *parts = CALLS[name]
    with pytest.raises(ValueError) as info:
        function()
    for part in parts:
        assert part in str(info.value)


# Files in an empty folder, by name.
TEXTS = {
    'toy.py': config_text(),
    'loop.py': "_base_ = 'loop.py'\n",
    'syntax.py': 'model = dict(\n',
    'base.py': "_base_ = 'missing.py'\n",
    'no_model.py': 'a = 1\n',
    'arch.py': config_text() + "model['backbone']['arch'] = 'huge'\n",
    'argument.py': config_text() + "model['backbone']['archs'] = 'tiny'\n",
    'type.py': config_text() + "model['backbone']['type'] = 'mmbiformer.BiFormr'\n",
    'init.py': config_text()
    + "model['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='none.pth')\n",
    'page.pth': '<!DOCTYPE html><html>not found</html>',
    'empty.pth': '',
    'pointer.pth': 'version https://git-lfs.github.com/spec/v1\noid sha256:0\n',
    'text.pth': 'hello',
    'lists.py': config_text()
    + "val_evaluator = [dict(type='ToyMetric'), dict(type='ToyMetric', ann_file='/none/a.json'),\n"
    "                 dict(type='ToyMetric', ann_file='none/b.json')]\n",
    'late.py': config_text() + "custom_hooks = [dict(type='EMAHook', begin_epoch=7)]\n",
    'epochs.py': config_text(by_epoch=False)
    + "custom_hooks = [dict(type='EMAHook', begin_epoch=7)]\n",
    'never.py': config_text()
    + "custom_hooks = [dict(type='mmbiformer.SideEMAHook', interval=0)]\n",
    'seg.py': config_text() + 'test_dataloader, test_cfg, test_evaluator = val_dataloader, {}, {}\n'
    "default_hooks.update(visualization=dict(type='SegVisualizationHook'))\n"
    "visualizer = dict(type='SegLocalVisualizer', vis_backends=dict(type='LocalVisBackend'))\n",
    'priority.py': config_text() + "custom_hooks = [dict(type='EMAHook', priority='TOP')]\n",
    'average.py': config_text() + "custom_hooks = [dict(type='EMAHook', momentum=2)]\n",
    'monitor.py': config_text() + "custom_hooks = [dict(type='EarlyStoppingHook', monitr='toy')]\n",
    'step.json': '{"step": "1", "loss": 2}',
    'long.json': f'{{"step": 1, "loss": {"9" * 400}}}',
    'deep.json': '[' * 100_000,
    'no_scope.py': config_text().replace("default_scope = 'mmengine'", ''),
}
COMMANDS = {
    'no config': ('train', ['none.py'], 'there is no config none.py', 'are in configs/'),
    'syntax': ('train', ['syntax.py'], 'syntax.py cannot be read', 'SyntaxError'),
    'base': ('train', ['base.py'], 'base.py cannot be read', 'missing.py'),
    'no model': ('train', ['no_model.py'], 'no_model.py has no model', '_base_'),
    'option': ('train', ['toy.py', '--cfg-options', 'model=3'], 'toy.py has no model'),
    'arch': ('train', ['arch.py'], "arch.py: model.backbone: arch='huge' is unknown; choose"),
    'argument': ('train', ['argument.py'], 'argument.py: model.backbone', "'archs'"),
    'type': ('train', ['type.py'], 'type.py: model.backbone', 'BiFormr is not in'),
    'init_cfg': ('train', ['init.py'], 'model.backbone.init_cfg: there is no file none.pth'),
    'init_cfg by option': (
        'train', ['toy.py', '--cfg-options', 'model.backbone.init_cfg.checkpoint=none.pth'],
        'model.backbone.init_cfg: there is no file none.pth',
    ),
    'no data': ('train', [COCO], 'missing: data/coco/train2017', 'ln -s', 'make demo'),
    'pretrained': ('train', ['toy.py', '--pretrained', 'none.pth'], 'there is no file none.pth'),
    'scheme': ('train', ['toy.py', '--pretrained', 's3://x.pth'], 's3://x.pth', 'download it'),
    'resume': ('train', ['toy.py', '--resume', 'none.pth'], '--resume: there is no file none.pth'),
    'resume text': ('train', ['toy.py', '--resume', 'text.pth'], "begins with b'hello'"),
    'work_dir': ('train', ['toy.py', '--work-dir', 'toy.py/w'], 'toy.py is a file', '--work-dir'),
    **{
        f'one name {value}': (
            'train',
            ['toy.py', '--cfg-options', f'default_hooks.checkpoint.filename_tmpl={value}'],
            'toy.py', f"filename_tmpl='{value}'", 'max_keep_ckpts=2', 'epoch_{}', '=-1',
        )
        for value in ('latest.pth', '{x}.pth')
    },
    'work_dir of the config': (
        'train', ['toy.py', '--work-dir', '.'], '--work-dir .', 'over toy.py', 'work_dirs/toy',
    ),
    'scale': ('train', ['toy.py', '--auto-scale-lr'], 'base_batch_size=N', 'toy.py'),
    **{
        f'scale by {value}': (
            'train', ['toy.py', '--auto-scale-lr', '--cfg-options', f'auto_scale_lr{value}'],
            'toy.py: auto_scale_lr.base_batch_size=', 'must be a positive int', 'N',
        )
        for value in ('=None', '.base_batch_size=0', '.base_batch_size=-2', '.base_batch_size=a')
    },
    'scale without option': (
        'train', ['toy.py', '--cfg-options', 'auto_scale_lr.enable=True'], 'size=None must be a p',
    ),
    'no checkpoint': ('test', ['toy.py', 'none.pth'], 'there is no file none.pth'),
    'page': ('test', ['toy.py', 'page.pth'], 'page.pth', 'HTML', 'the download probably failed'),
    'empty': ('test', ['toy.py', 'empty.pth'], 'empty.pth', 'is empty', 'fetch it again'),
    'pointer': ('test', ['toy.py', 'pointer.pth'], 'pointer.pth', 'git lfs pull'),
    'truncated': ('test', ['toy.py', 'short.pth'], 'short.pth', 'truncated', 'copy it again'),
    'pickle': ('test', ['toy.py', 'module.pth'], 'pickled object', 'state_dict'),
    'other model': ('test', ['toy.py', 'other.pth'], 'other.pth', "['fc.weight']", 'expected'),
    'tensors': ('test', ['toy.py', 'short.safetensors'], 'short.safetensors', 'truncated'),
    'list': ('test', ['toy.py', 'list.pth'], 'list.pth holds no weights by name: list'),
    'convert': ('convert_checkpoint', ['other.pth', 'x.pth'], "['fc.weight']", 'github.com'),
    'overwrite': ('convert_checkpoint', ['other.pth', 'toy.py'], 'toy.py exists already', 'remove'),
    'convert to folder': ('convert_checkpoint', ['whole.pth', '.'], '. is a folder; give FOLDER/'),
    'convert to no folder': ('convert_checkpoint', ['whole.pth', 'new.pth/'], 'new.pth/ is a f'),
    'convert to link': ('convert_checkpoint', ['whole.pth', 'link.pth'], 'exists already'),
    **{
        f'{tool} of a URL': (
            f'{tool}', ['https://host/a.pth', 'x.pth'], 'SRC: https://host/a.pth is no file; downl',
        )
        for tool in ('convert_checkpoint', 'publish_model')
    },
    'convert nothing': ('convert_checkpoint', ['names.pth', 'x.pth'], 'names.pth', 'no tensors'),
    'convert to': ('convert_checkpoint', ['other.pth', 'toy.py/x.pth'], 'is a file', 'another DST'),
    'publish to': ('publish_model', ['other.pth', 'toy.py/x.pth'], 'is a file', 'another DST'),
    'publish to folder': ('publish_model', ['other.pth', '.'], '. is a folder', 'NAME.pth'),
    'no value': ('train', ['toy.py', '--cfg-options', 'abc'], '--cfg-options abc', 'KEY=VALUE'),
    'bracket': ('train', ['toy.py', '--cfg-options', 'a=[(1]'], '--cfg-options a=[(1]', 'brackets'),
    'evaluator': (
        'train', ['toy.py', '--cfg-options', 'val_evaluator.ann_file=none.json'],
        'missing: none.json', 'evaluators',
    ),
    'evaluators': (
        'train', ['lists.py'], 'missing: /none/a.json', 'missing: none/b.json', 'evaluators',
    ),
    'plot': ('plot_logs', ['module.pth'], 'module.pth is no text', 'scalars.json'),
    **{
        f'plot {name}': ('plot_logs', [name], f'{name}, line 1: not a record of MMEngine')
        for name in ('step.json', 'long.json', 'deep.json')
    },
    'plot nothing': ('plot_logs', ['empty.pth'], 'empty.pth is empty: nothing was logged yet'),
    'plot to folder': ('plot_logs', ['toy.py', '--out', 'd.pkl'], '--out d.pkl is a folder; give'),
    'plot as': ('plot_logs', ['toy.py', '--out', 'x.xyz'], '--out x.xyz', '.png'),
    'plot to': ('plot_logs', ['toy.py', '--out', 'toy.py/x.png'], 'is a file', 'another --out'),
    'shapes to': ('make_shapes', ['--out', 'toy.py/s'], 'toy.py is a file', 'another --out'),
    'shapes to system': ('make_shapes', ['--out', '/proc/s'], '/proc', 'another --out'),
    'demo of seed': ('demo', ['--seed', '-1'], '--seed -1 must be 0 or above'),
    'preview as': ('make_shapes', ['--out', 's', '--preview', 'x'], '--preview x', '.png'),
    'preview to': (
        'make_shapes', ['--out', 's', '--preview', 'toy.py/x.png'], 'is a file', '--preview',
    ),
    'preview of no name': ('make_shapes', ['--out', 's', '--preview', '.png'], 'must end as that'),
    'preview to folder': ('make_shapes', ['--out', 's', '--preview', 'd.pkl'], 'd.pkl is a folder'),
    **{
        f'shapes {option}': ('make_shapes', ['--out', 's', *option.split()], *parts)
        for option, *parts in [
            ('--class-colour -1', 'class_colour must be in [0, 1]'),
            ('--contrast 256', 'contrast must be in [0, 255]'),
            ('--texture inf', 'texture must be finite'),
            ('--large-bias nan', 'large_bias must be positive'),
        ]
    },
    'flops of the world': ('get_flops', ['toy.py', '--shape', f'{10**20}'], '000: give', '1048576'),
    'time of the world': (
        'benchmark', ['toy.py', '--batch-size', f'{10**20}'], '--batch-size', 'from 1 to 1000000',
    ),
    'flops of type': (
        'get_flops', ['toy.py', '--shape', '32', '--cfg-options', 'model.type=Toy'],
        'toy.py: the model cannot be built: Toy is not in',
    ),
    'flops of host': ('get_flops', ['toy.py'], "default_scope='mmengine' must be one of ['mmpre"),
    'flops of shape': (
        'get_flops', ['toy.py', '--shape', '32'], "default_scope='mmengine' is not known", 'mmseg',
    ),
    'no host': ('get_flops', ['no_scope.py', '--shape', '32'], 'no default_scope', 'mmdet'),
    'time of type': (
        'benchmark', ['toy.py', '--shape', '32', '--cfg-options', 'model.type=Toy'],
        'toy.py: the model cannot be built: Toy is not in',
    ),
    'time of host': ('benchmark', ['no_scope.py'], 'default_scope=None must be one of'),
    'time of shape': (
        'benchmark', ['toy.py', '--shape', '32'], "default_scope='mmengine' is not known", 'mmseg',
    ),
    'no optimizer': (
        'benchmark', ['toy.py', '--shape', '32', '--cfg-options', 'optim_wrapper=None'],
        'toy.py has no optim_wrapper',
    ),
    'no images': (
        'browse_dataset', ['toy.py', '--cfg-options', 'train_dataloader=None'],
        'toy.py has no train_dataloader',
    ),
    'untrained': ('train', ['toy.py', '--cfg-options', 'optim_wrapper=None'], 'training needs'),
    **{
        f'set {value}': ('train', ['toy.py', '--cfg-options', value], 'toy.py', *parts)
        for value, *parts in [
            ('optim_wrapper=1', 'optim_wrapper=1 must be a dict'),
            ('train_dataloader=3', 'train_dataloader=3 must be a dict'),
            ('train_dataloader.dataset=3', 'train_dataloader.dataset=3 must be a dict'),
            ('train_dataloader.num_workers=abc', "num_workers='abc' must be an int"),
            ('train_dataloader.dataset.data_root=5', 'dataset.data_root=5 must be a str'),
            ('train_dataloader.dataset.type=Toy', 'train_dataloader', 'Toy is not in the dataset'),
            ('default_hooks=3', 'default_hooks=3 must be a dict'),
            ('default_hooks.logger=3', 'default_hooks.logger=3 must be a dict'),
            ('default_hooks.logger.interva=3', 'default_hooks.logger', 'interva', 'LoggerHook'),
            ('default_hooks.checkpoint.interval=abc', 'checkpoint', "interval='abc'", 'an int'),
            ('default_hooks.checkpoint.interval=1.5', 'interval=1.5', 'must be an int'),
            ('default_hooks.checkpoint.interval=0', 'checkpoint of', 'interval=0 must be a positi'),
            ('default_hooks.checkpoint.max_keep_ckpts=0', 'max_keep_ckpts=0', '-1 for all'),
            ('default_hooks.checkpoint.intervall=3', "takes no argument 'intervall'"),
            ('default_hooks.checkpoint.rule=best', 'checkpoint of', "rule='best'"),
            ('default_hooks.logger.interval=0', 'logger of', 'greater than 0', 'interval=0)'),
            ('default_hooks.timer.interval=3', 'default_hooks.timer of', "it has no 'type'"),
            ('custom_hooks=3', 'custom_hooks=3 must be a list'),
            ('custom_hooks=[EMAHook]', "custom_hooks[0]='EMAHook' must be a dict"),
            ('optim_wrapper.clip_grad.max_norm=-1', 'optim_wrapper of', 'max_norm=-1 must be a nu'),
            ('load_from=5', 'load_from=5 must be a str'),
            ('resume=maybe', "resume='maybe' must be a bool"),
            ('optim_wrapper.optimizer.type=AdamV', 'optim_wrapper', 'AdamV is not in', 'Mend'),
            ('optim_wrapper.optimizer.lr=abc', 'optim_wrapper', 'Mend the name or the value'),
            ('optim_wrapper.optimizer.lrr=1', 'optim_wrapper', 'lrr'),
            ('optim_wrapper.type=Amp', 'optim_wrapper', 'Amp is not in'),
            ('param_scheduler.type=Cos', 'param_scheduler', 'Cos is not in'),
            ('param_scheduler.T_max=abc', 'param_scheduler', "T_max='abc'", 'must be an int'),
            ('param_scheduler.T_max=[1]', 'param_scheduler', 'T_max=[1]', 'must be an int'),
            ('param_scheduler.T_maxx=1', 'param_scheduler', 'T_maxx'),
            ('val_evaluator.type=Toy', 'val_evaluator', 'Toy is not in the metric'),
            ('model.data_preprocessor=3', 'the model cannot be built'),
            ('model.backbone=3', 'model.backbone=3 must be a dict'),
            ('log_level=abc', "log_level='abc' must be DEBUG, INFO", 'or an int'),
            ('randomness.seed=abc', "randomness.seed='abc' must be an int from 0", 'None'),
            ('randomness.seed=-1', 'randomness.seed=-1 must be an int from 0 to 2**32 - 1'),
            ('randomness.sed=1', 'randomness of toy.py', "'seed'", 'Mend'),
            ('randomness=None', 'randomness=None must be a dict'),
            ('env_cfg=None', 'env_cfg=None must be a dict'),
            ('env_cfg.mp_cfg=3', 'env_cfg.mp_cfg=3 must be a dict'),
            ('env_cfg.mp_cfg.mp_start_method=abc', "mp_start_method='abc' must be one of ['fork'"),
            ('env_cfg.mp_cfg.mp_start=abc', 'env_cfg.mp_cfg of', "'mp_start'", 'Mend'),
            ('env_cfg.mp_cfg.opencv_num_threads=abc', "threads='abc' must be an int"),
            ('env_cfg.dist_cfg=3', 'env_cfg.dist_cfg=3 must be a dict'),
            ('env_cfg.resource_limit=abc', "resource_limit='abc' must be an int or float"),
            ('visualizer.type=Toy', 'visualizer of', 'Toy is not in the visualizer'),
            ('visualizer.name=x', 'visualizer of', "it has no 'type', but {'name': 'x'}"),
            ('log_processor.window=9', 'log_processor of', "takes no argument 'window'"),
            ('model.backbone.region_grid=-1', 'model.backbone', 'region_grid=-1', 'positive'),
        ]
    },
    **{
        f'set {value}': ('train', ['toy.py', '--cfg-options', value], *parts)
        for value, *parts in [
            ('load_from=', 'load_from: there is no file'),
            ('=3', '--cfg-options =3: give KEY=VALUE'),
            ('model.=3', '--cfg-options model.=3: give KEY=VALUE'),
            ('train_dataloders.batch_size=1', 'no train_dataloders; did you mean train_dataload'),
            ('max_epochs=3', 'toy.py has no max_epochs'),
            ('train_cfg.max_epochs=0', 'train_cfg.max_epochs=0 must be a positive int'),
            ('train_cfg.val_interval=0', 'must be a positive int; --no-validate'),
            ('train_cfg.val_begin=7', 'val_begin=7 is behind', 'training, 6', '--no-validate'),
            ('compile=maybe', "toy.py: compile='maybe' must be a bool or dict"),
            ('compile.mod=a', "toy.py: compile: torch.compile: ", "argument 'mod'"),
            ('compile.mode=a', 'toy.py: compile: torch.compile: ', 'mode=a', 'reduce-overhead'),
            ('compile.backend=a', 'toy.py: compile: torch.compile: ', "backend: 'a'"),
            ('compile.options.a=1', 'toy.py: compile: torch.compile: ', 'option a'),
            ('train_dataloader.num_workers=100000', 'num_workers must be at most 1000', '100000'),
            ('train_dataloader.num_batch_per_epoch=a', "num_batch_per_epoch='a' must be an int"),
            ('train_dataloader.timeout=a', 'train_dataloader of toy.py', "timeout='a'"),
            ('default_hooks.checkpoint.out_dir=5', 'out_dir=5 of CheckpointHook must be a str'),
            ('optim_wrapper.accumulative_counts=a', 'optim_wrapper', "accumulative_counts='a'"),
            ('optim_wrapper.clip_grad.max_nrm=1', 'optim_wrapper of toy.py cannot', "'max_nrm'"),
            ('custom_imports.imports.x=3', 'imports.x: custom_imports.imports is a list', '.0'),
            ('custom_imports.imports.2=a', 'custom_imports.imports is a list of 2', '2 names none'),
        ]
    },
    **{
        f'visualizer {value}': (
            'train', ['toy.py', '--cfg-options', 'visualizer.type=Visualizer', value], *parts
        )
        for value, *parts in [
            ('visualizer.nam=x', "Visualizer takes no argument 'nam'"),
            ('visualizer.name=3', 'visualizer.name=3 must be a str'),
            ('visualizer.vis_backends=3', 'visualizer.vis_backends=3 must be a dict or list'),
            ('visualizer.vis_backends=[Local]', "one of visualizer.vis_backends='Local' must be"),
            ('visualizer.vis_backends.type=Toy', 'visualizer.vis_backends of', 'Toy is not in'),
            ('visualizer.vis_backends.type=AimVisBackend', 'AimVisBackend in', 'pip install aim'),
        ]
    },
    'average of no epoch': (
        'train', ['late.py'], 'custom_hooks of late.py', 'max_epochs=6', 'never', 'begin_epoch=7)',
    ),
    'average by epoch': ('train', ['epochs.py'], 'by_epoch=False; set begin_iter', 'epoch=7)'),
    'average of no step': ('train', ['never.py'], 'interval must not be 0', 'interval=0)'),
    'prefetch': (
        'train',
        ['toy.py', '--cfg-options', 'train_dataloader.num_workers=1',
         'train_dataloader.prefetch_factor=0'],
        'train_dataloader of toy.py', 'prefetch_factor must be positive', 'prefetch_factor=0',
    ),
    'images without a score': (
        'train', ['toy.py', '--cfg-options', 'val_dataloader.drop_last=True'],
        'val_dataloader of toy.py', 'out of the score', 'drop_last=True',
    ),
    'priority of a hook': ('train', ['priority.py'], 'custom_hooks of priority.py', 'TOP'),
    'momentum': ('train', ['average.py'], 'custom_hooks of average.py', 'but got 2', 'momentum=2)'),
    'argument of a hook': ('train', ['monitor.py'], 'custom_hooks of monitor.py', "'monitr'"),
    'base of itself': ('train', ['loop.py'], 'loop.py cannot be read', '_base_ name itself?'),
    'convert as': ('convert_checkpoint', ['other.pth', 'x.SAFETENSORS'], 'x.SAFET', 'in .pth or'),
    'publish as': ('publish_model', ['other.pth', 'x.safetensors'], 'x.safetensors', 'in .pth'),
    'untested': ('test', ['toy.py', 'whole.pth'], 'toy.py has no test_dataloader', 'testing needs'),
    'predictions to': ('test', ['toy.py', 'other.pth', '--out', 'd.pkl'], 'd.pkl is a folder'),
    'pictures of predictions over data': (
        'test',
        ['toy.py', 'other.pth', '--show-dir', './d.pkl/x', '--cfg-options',
         'val_dataloader.dataset.data_prefix.img=d.pkl'],
        '--show-dir ./d.pkl/x', 'of toy.py, which are in d.pkl', 'choose',
    ),
    **{
        f'pictures without {name}': (
            'test', ['seg.py', 'whole.pth', '--show-dir', 'p', '--cfg-options', f'{name}=None'],
            '--show-dir: ', 'seg.py has no visual' if part else 'no LocalVisBackend',
        )
        for name, part in [
            ('default_hooks', True), ('visualizer', True), ('visualizer.vis_backends', False),
        ]
    },
    'tta_model': ('test', ['seg.py', 'x', '--tta', '--cfg-options', 'tta_model=3'], 'be a dict'),
    'tta': ('test', ['seg.py', 'x', '--tta', '--cfg-options', 'tta_pipeline=3'], '=3 must be a li'),
    'pictures over data': (
        'browse_dataset',
        ['toy.py', '--output', 'd.pkl', '--cfg-options',
         'train_dataloader.dataset.data_prefix=d.pkl'],
        '--output-dir d.pkl', 'of toy.py, which are in d.pkl', 'outside of that',
    ),
    'pictures over data of a root': (
        'browse_dataset',
        ['toy.py', '-o', 'full/x', '--cfg-options', 'train_dataloader.dataset.data_root=full',
         'train_dataloader.dataset.ann_file=../toy.py'],
        '--output-dir full/x', 'which are in full;', 'or one that is not there yet',
    ),
    'pictures to a file': (
        'browse_dataset', ['toy.py', '-o', 'toy.py/x'], 'toy.py is a file', '--output-dir',
    ),
    'pictures among folders of classes': (
        'browse_dataset',
        ['toy.py', '-o', 'd.pkl/new', '--cfg-options', 'train_dataloader.dataset.data_root=d.pkl'],
        '--output-dir d.pkl/new', 'which are in d.pkl', 'outside of that',
    ),
    'hooks by option': (
        'train', ['toy.py', '--cfg-options', "custom_hooks=[dict(type='EMAHook',momentum=0.1)]"],
        '--cfg-options custom_hooks=', 'KEY=VALUE',
    ),
    'pretrained of another': (
        'train', ['toy.py', '--pretrained', 'other.pth'], 'other.pth: ', "['fc.weight']",
    ),
    'launcher': ('train', ['toy.py', '--launcher', 'slurm'], '--launcher slurm', 'dist_train.sh'),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in TEXTS.items():
        Path(name).write_text(text)
    torch.save({'a': torch.ones(100)}, 'short.pth')
    Path('short.pth').write_bytes(Path('short.pth').read_bytes()[:300])
    torch.save({'fc.weight': torch.ones(1)}, 'other.pth')
    torch.save(torch.nn.Linear(1, 1), 'module.pth')
    torch.save([1], 'list.pth')
    torch.save({'model': {'backbone.stages.0.0.norm1.weight': 'text'}}, 'names.pth')
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    Path('d.pkl').mkdir()
    Path('full/x/y').mkdir(parents=True)
    Path('link.pth').symlink_to('nowhere')
    torch.save({'backbone.stages.0.0.norm1.weight': torch.ones(32)}, 'whole.pth')
    Path('short.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + bytes(3))
    return tmp_path


@pytest.mark.parametrize('name', COMMANDS)
def test_commands(name, folder, monkeypatch, capsys):
    tool, options, *parts = COMMANDS[name]
    if name == 'launcher' and torch.cuda.is_available():
        return
    monkeypatch.setattr(sys, 'argv', [f'{tool}.py', *options])
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob('*')}
    (path,) = (ROOT / 'tools').rglob(f'{tool}.py')
    main = runpy.run_path(str(path), run_name='tool')['main']
    with pytest.raises(SystemExit) as info:
        run_command(main)
    found = capsys.readouterr().err
    assert info.value.code == 2, found
    for part in ['error: ', *parts]:
        assert part in found, found
    assert 'Traceback' not in found
    after = {path: path.lstat().st_mtime_ns for path in folder.rglob('*')}
    assert after == before


def test_files_that_fail(tmp_path, capsys):
    """Whatever a command opens; an error that names no file keeps its traceback."""
    path = tmp_path / 'none' / 'x'
    with pytest.raises(SystemExit) as info:
        run_command(path.read_text)
    assert info.value.code == 2
    assert f'error: {path}: No such file or directory; ' in capsys.readouterr().err

    def fail():
        raise OSError('of no file')

    with pytest.raises(OSError, match='of no file'):
        run_command(fail)

    def refuse():  # where the Runner makes its folders, say
        error = PermissionError(errno.EACCES, 'Permission denied', '/x')
        exec(compile('raise error', 'runner/runner.py', 'exec'), dict(error=error))

    with pytest.raises(SystemExit):
        run_command(refuse)
    assert 'error: /x: Permission denied; it must be' in capsys.readouterr().err
    run_command(lambda: None)
    assert capsys.readouterr().err == ''


def test_interrupt(capsys):
    """Ctrl-C is no bug, of which a traceback would tell."""

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as info:
        run_command(fail)
    assert info.value.code == 130
    assert capsys.readouterr().err == 'interrupted\n'


def test_message_ends_the_report_of_torchrun(tmp_path, monkeypatch):
    """Which is longer than a screen."""

    def fail():
        raise CommandError('there is no $config')

    path = tmp_path / 'error.json'
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(path))
    with pytest.raises(SystemExit):
        run_command(fail)
    report = str(ChildFailedError('train.py', {0: ProcessFailure(0, 1, 2, str(path))}))
    assert report.splitlines()[-2].endswith(' : error: there is no $config')


def test_messages_move_no_cursor(capsys):
    """Names in them may be a stranger's: of classes, of parameters, of files."""

    def fail():
        raise CommandError('the class \x1b[2Jcat\r\x9b1m …\nis größer\u202e\udcff')

    with pytest.raises(SystemExit):
        run_command(fail)
    found = capsys.readouterr().err
    assert found == 'error: the class \\x1b[2Jcat\\r\\x9b1m …\nis größer\\u202e\\udcff\n'


def test_other_process_that_ended(monkeypatch, capsys):
    """While parts are built, too; without other processes it is no fault of theirs."""

    def fail():
        raise RuntimeError('[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:5')

    with pytest.raises(RuntimeError, match='closed by peer'):
        run_command(fail)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    with pytest.raises(SystemExit):
        run_command(fail)
    assert 'error: another process of this job ended: [gloo' in capsys.readouterr().err
