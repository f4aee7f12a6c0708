"""What is looked at before anything runs or is written: files, folders, the config."""

import contextlib
import copy
import difflib
import errno
import importlib.util
import inspect
import io
import multiprocessing
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.model import BaseDataPreprocessor
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    FUNCTIONS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    Registry,
    init_default_scope,
)
from mmengine.runner import Runner, get_priority, load_checkpoint
from mmengine.utils.dl_utils import set_multi_processing
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoint import named
from .check_coco import check_coco
from .check_compile import compile_problem
from .check_lists import check_list
from .check_metrics import check_metric
from .check_widths import widths_problem
from .fake_data import SIZES

SETTINGS: dict[tuple[type, ...], str] = {
    (dict,): 'train_cfg val_cfg test_cfg optim_wrapper default_hooks env_cfg auto_scale_lr '
    'visualizer randomness log_processor data_preprocessor tta_model',
    (dict, list, tuple): 'param_scheduler val_evaluator test_evaluator',
    (list, tuple): 'custom_hooks tta_pipeline',
    (str,): 'default_scope load_from work_dir',
    (bool,): 'resume',
    (bool, dict): 'compile',
}
"""Settings of a config and the kinds of value that they take; all may be None or missing."""
PACKAGES = dict(
    AimVisBackend='aim',
    ClearMLVisBackend='clearml',
    DVCLiveVisBackend='dvclive',
    MLflowVisBackend='mlflow',
    NeptuneVisBackend='neptune',
    TensorboardVisBackend='tensorboard',
    WandbVisBackend='wandb',
)
"""What MMEngine's visualization backends import."""
LOADER: dict[tuple[type, ...], str] = {
    (dict,): 'dataset sampler batch_sampler',
    (int,): 'batch_size num_workers num_batch_per_epoch',
}
DATASET: dict[tuple[type, ...], str] = {
    (str, list, tuple, dict): 'data_root ann_file',
    (list, tuple): 'pipeline',
    (dict,): 'metainfo',
}
MOST_WORKERS = 1000
"""Of a data loader: each is a process."""
CHANNELS = 3
"""Of the images that our backbones take."""
DISK = {
    *(errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS),
}
"""Errors of disks and permissions, which are no bugs wherever they come from."""
SPLITS = 'train', 'val', 'test'
LISTED = 'CustomDataset', 'ImageNet', 'ImageNet21k'
"""Data sets of MMPretrain whose ann_file is a text list."""
OTHER_SETTINGS = (
    *('compile', 'find_unused_parameters', 'detect_anomalous_params', 'model_wrapper_cfg'),
    *('runner_type', 'strategy', 'sync_bn', 'tta_model', 'tta_pipeline'),
)
"""Settings that are read although they are no argument of MMEngine's Runner."""


class CommandError(Exception):
    """What the user must mend; shown as one message, without a traceback."""


def check_file(path: str, what: str, urls: bool = True) -> None:
    """Raise CommandError unless there is such a file.

    Args:
        path: Path or URL.
        what: What the file is, for the message.
        urls: Whether http(s) URLs will do. Defaults to True.
    """
    if urls and path.startswith(('http://', 'https://')):
        return
    if '://' in path:
        wanted = 'file or http(s) URL' if urls else 'file'
        raise CommandError(f'{what}: {path} is no {wanted}; download it first')
    if not Path(path).expanduser().is_file():
        raise CommandError(f'{what}: there is no file {path}')


def check_writable(folder: str, option: str = '--work-dir') -> None:
    """Raise CommandError unless a folder can be written, or made.

    Args:
        folder: Path of the folder.
        option: The option that says where to write. Defaults to ``'--work-dir'``.
    """
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    reason = None
    if not existing.is_dir():
        reason = 'is a file'
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = 'may not be written'
    else:
        try:  # root may write everywhere, and yet not into /proc, say
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(b'x')  # an empty file may find room on a full disk
        except OSError as error:
            reason = f'takes no new file ({error.strerror})'
    if reason:
        raise CommandError(
            f'{folder} cannot be written: {existing} {reason}; choose another {option}'
        )


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Raise CommandError if a data set is not there, or its annotation file is broken.

    Files are looked into if they are COCO's, or MMPretrain's lists of names and labels.

    Args:
        cfg: The whole config.
        splits: Which data loaders will be used, of ``'train'``, ``'val'``, ``'test'``.
    """
    needed = data_paths(cfg, splits)
    missing = [path for path in needed if '://' not in path and not os.path.exists(path)]
    if not missing:
        _check_kinds_of_paths(cfg, splits)
        _check_links(cfg, splits)
        problems = {path: check_coco(path, own) for path, own in _coco_files(cfg, splits).items()}
        problems |= {path: check_list(path) for path in _lists(cfg, splits)}
        for path, problem in problems.items():
            if problem:
                raise CommandError(f'{path} cannot be used: {problem}')
        return
    for path in missing:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
            os.stat(path)  # or it may not be seen
    root = os.path.dirname(missing[0])
    if len(missing) > 1 and len({*map(os.path.isabs, missing)}) == 1:
        root = os.path.commonpath(missing)
    advice = "Put the data there, or mend the paths of the config's data loaders and evaluators"
    if root and not os.path.exists(root):
        advice += f', or link it:  ln -s /path/to/your/data {root}'
    raise CommandError(
        f'the data set of {cfg.filename} is not there.\n'
        + ''.join(f'  missing: {path}\n' for path in missing)
        + 'The config expects these files and folders:\n'
        + ''.join(f'  {path}\n' for path in sorted(needed))
        + f'{advice}\nTo see everything work without any data:  make demo'
    )


def _check_kinds_of_paths(cfg: Config, splits: tuple[str, ...]) -> None:
    """Of data sets of others, nothing is known but that a pipe would be waited for."""
    for path in data_paths(cfg, splits):
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise CommandError(f'{path} is neither a file nor a folder; put the data there')
    for split, dataset in _datasets_of(cfg, splits):
        if type_name(dataset).rpartition('.')[2] not in (*LISTED, 'CocoDataset'):
            continue
        for path in _paths(dataset):
            if path == _ann_file(dataset):
                if os.path.isdir(path):
                    raise CommandError(
                        f'{path} is a folder; ann_file in {split}_dataloader must name a file'
                    )
            elif os.path.isfile(path):
                raise CommandError(
                    f'{path} is a file; data_root and data_prefix in {split}_dataloader must name '
                    'a folder'
                )


def _check_links(cfg: Config, splits: tuple[str, ...]) -> None:
    """What the hosts list, they follow links in: several that lead back are followed for years."""
    left: dict[str, bool] = {}  # of folders that were entered
    for _, dataset in _datasets_of(cfg, splits):
        listed = cfg.get('default_scope') in ('mmpretrain', 'mmseg')
        if listed and not os.path.isfile(_ann_file(dataset)):
            for folder in filter(os.path.isdir, _paths(dataset)):
                _enter(folder, left)


def _enter(folder: str, left: dict[str, bool]) -> None:
    real = os.path.realpath(folder)
    if left.get(real) is False:
        raise CommandError(leads_back(folder))
    if real not in left:
        left[real] = False
        with os.scandir(folder) as entries:
            inner = [
                entry.path
                for entry in entries
                if entry.is_dir(follow_symlinks=False)
                or (entry.is_symlink() and os.path.isdir(entry.path))
            ]
        for path in inner:
            _enter(path, left)
        left[real] = True


def leads_back(link: str) -> str:
    """What to tell the user of a link to a folder around it.

    Args:
        link: Its path.
    """
    return (
        f'{link} is a link that leads back to where it is, so that the files of its folder have no '
        'end: remove it'
    )


def _lists(cfg: Config, splits: tuple[str, ...]) -> Iterator[str]:
    """The lists of names and labels that MMPretrain reads."""
    for _, dataset in _datasets_of(cfg, splits):
        scope, _, name = type_name(dataset).rpartition('.')
        of_host = (scope or cfg.get('default_scope')) == 'mmpretrain' and name in LISTED
        labels = dataset.get('with_label', True) and dataset.get('split') != 'test'
        if of_host and labels and os.path.isfile(_ann_file(dataset)):
            yield _ann_file(dataset)


def _coco_files(cfg: Config, splits: tuple[str, ...]) -> dict[str, bool]:
    """The annotation files of COCO data sets, and whether metrics are computed from them."""
    found: dict[str, bool] = {}
    for _, dataset in _datasets_of(cfg, splits):
        if type_name(dataset).rpartition('.')[2] == 'CocoDataset':
            paths = [path for path in _paths(dataset) if path.endswith('.json')]
            found.update(dict.fromkeys(paths, False) | found)
    for split in splits:
        evaluators = cfg.get(f'{split}_evaluator') or []
        for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
            if type_name(evaluator).rpartition('.')[2] == 'CocoMetric' and isinstance(
                evaluator.get('ann_file'), str
            ):
                path = evaluator['ann_file']
                found[path] = found.get(path, False) or not evaluator.get('format_only')
    return found


def data_paths(cfg: Config, splits: tuple[str, ...]) -> list[str]:
    """The annotation files and folders that data sets and evaluators of splits read, each once."""
    found: dict[str, None] = {}
    for split in splits:
        if loader := cfg.get(f'{split}_dataloader'):
            for dataset in _datasets(loader.dataset):
                found.update(dict.fromkeys(_paths(dataset)))
        evaluators = cfg.get(f'{split}_evaluator') or []
        for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
            if isinstance(evaluator, dict) and isinstance(evaluator.get('ann_file'), str):
                found[evaluator['ann_file']] = None
    return [*found]


def check_apart(cfg: Config, folder: str, option: str) -> None:
    """Raise CommandError if pictures in a folder would replace images or masks of a data set.

    The hosts paint under the name of the image.

    Args:
        cfg: The whole config.
        folder: Path of the folder.
        option: The option that says where to paint.
    """
    target = Path(os.path.realpath(folder))
    for path, whole in _image_folders(cfg):
        inside = os.path.isdir(path) and target.is_relative_to(os.path.realpath(path))
        if inside and (whole or (target.is_dir() and any(target.iterdir()))):
            raise CommandError(
                f'{option} {folder}: pictures there could replace those of the data set of '
                f'{cfg.filename}, which are in {path}; choose a folder outside of that'
                + ('' if whole else ', or one that is not there yet')
            )


def _image_folders(cfg: Config) -> Iterator[tuple[str, bool]]:
    """Folders of images and masks, each with whether all in it belongs to the data.

    In a root where only an annotation file tells where images are, other folders may be.
    """
    for _, dataset in _datasets_of(cfg, SPLITS):
        root, prefix = dataset.get('data_root'), dataset.get('data_prefix') or {}
        root = root if isinstance(root, str) else ''
        parts = [*prefix.values()] if isinstance(prefix, dict) else [prefix]
        for part in parts or [dataset.get('split') or '']:
            path = os.path.join(root, part if isinstance(part, str) else '')
            at_root = os.path.realpath(path) == os.path.realpath(root)
            yield path.rstrip('/'), not (at_root and dataset.get('ann_file'))


def check_settings(cfg: Config) -> None:
    """Raise CommandError if a setting is not of the kind that MMEngine takes.

    Args:
        cfg: The whole config.
    """
    model = cfg.get('model')
    if not isinstance(model, dict):
        raise CommandError(
            f'{cfg.filename} has no model = dict(...); inherit from one of configs/ by _base_'
        )
    _check_kinds(cfg, cfg, SETTINGS)
    for name in ('param_scheduler', 'custom_hooks', 'val_evaluator', 'test_evaluator'):
        value = cfg.get(name)
        for i, item in enumerate(value if isinstance(value, (list, tuple)) else ()):
            _require_kind(cfg, f'{name}[{i}]', item, (dict,))
    for name, hook in (cfg.get('default_hooks') or {}).items():
        _require_kind(cfg, f'default_hooks.{name}', hook, (dict, type(None)))
    for split in SPLITS:
        name = f'{split}_dataloader'
        loader = cfg.get(name)
        if loader is None:
            continue
        _require_kind(cfg, name, loader, (dict,))
        _check_kinds(cfg, loader, LOADER, f'{name}.')
        if not isinstance(loader.get('dataset'), dict):
            raise CommandError(f'{cfg.filename}: {name} has no dataset = dict(...)')
        for dataset in _datasets(loader.dataset):
            _require_kind(cfg, f'a data set of {name}', dataset, (dict,))
            _check_kinds(cfg, dataset, DATASET, f'{name}: dataset.')
    _require_kind(cfg, 'model.backbone', model.get('backbone', {}), (dict, type(None)))


def check_training(cfg: Config) -> None:
    """Raise CommandError if a config lacks what training needs.

    Args:
        cfg: The whole config.
    """
    _require_settings(cfg, ('train_dataloader', 'train_cfg', 'optim_wrapper'), 'training')
    by_epoch = cfg.train_cfg.get('by_epoch')
    if ('type' in cfg.train_cfg) == (by_epoch is not None):
        raise CommandError(
            f'{cfg.filename}: train_cfg must have one of by_epoch=True, by_epoch=False and '
            "type='...'; to take by_epoch of a base away, begin with _delete_=True"
        )
    needed = 'max_epochs' if by_epoch else 'max_iters'
    if by_epoch is not None and cfg.train_cfg.get(needed) is None:
        raise CommandError(f'{cfg.filename}: train_cfg with by_epoch={by_epoch} needs {needed}')
    for name in ('max_epochs', 'max_iters', 'val_interval'):
        value = cfg.train_cfg.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise CommandError(
                f'{cfg.filename}: train_cfg.{name}={value!r:.80} must be a positive int'
                + ('; --no-validate switches validation off' if name == 'val_interval' else '')
            )
    begin = cfg.train_cfg.get('val_begin')
    end = cfg.train_cfg.get('max_epochs') or cfg.train_cfg.get('max_iters')
    if cfg.get('val_cfg') is not None and end and type(begin) is int and begin > end:
        raise CommandError(
            f'{cfg.filename}: train_cfg.val_begin={begin} is behind the end of the training, {end},'
            ' so that nothing would be validated; lower it, or give --no-validate'
        )
    scale = cfg.get('auto_scale_lr') or {}
    base = scale.get('base_batch_size')
    if scale.get('enable') and (type(base) is not int or base < 1):
        raise CommandError(
            f'{cfg.filename}: auto_scale_lr.base_batch_size={base!r:.80} must be a positive int, '
            'the total batch size that the learning rate is for; set auto_scale_lr = '
            'dict(base_batch_size=N), or do not scale'
        )
    if problem := compile_problem(cfg.get('compile')):
        raise CommandError(f'{cfg.filename}: compile: {problem}')


def check_splits(cfg: Config) -> None:
    """Raise CommandError if a split has a data loader, but no evaluator or loop, or the reverse.

    Args:
        cfg: The whole config.
    """
    for split in ('val', 'test'):
        names = [f'{split}_{name}' for name in ('dataloader', 'evaluator', 'cfg')]
        missing = [name for name in names if cfg.get(name) is None]
        if 0 < len(missing) < len(names):
            there = ' and '.join(name for name in names if name not in missing)
            raise CommandError(
                f'{cfg.filename} has {there}, but no {" and no ".join(missing)}; set all of '
                f'{", ".join(names)} (the last may be dict()), or all to None'
            )


def check_testing(cfg: Config) -> None:
    """Raise CommandError if a config lacks what testing needs.

    Args:
        cfg: The whole config.
    """
    _require_settings(cfg, ('test_dataloader', 'test_cfg', 'test_evaluator'), 'testing')


def _require_settings(cfg: Config, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if cfg.get(name) is None:
            raise CommandError(
                f'{cfg.filename} has no {name} = dict(...), which {what} needs; inherit from one '
                'of configs/ by _base_'
            )


def check_options(cfg: Config, options: dict[str, Any]) -> None:
    """Raise CommandError if ``--cfg-options`` set what nobody reads.

    Args:
        cfg: The whole config, as it is in the file.
        options: Dotted names and values.
    """
    known = {*cfg, *inspect.signature(Runner.__init__).parameters, *OTHER_SETTINGS}
    for key, value in options.items():
        if not all(key.split('.')):
            raise CommandError(f'--cfg-options {key}={value}: give KEY=VALUE')
        name = key.split('.')[0]
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise CommandError(
                f'--cfg-options {key}: {cfg.filename} has no {name}'
                + (f'; did you mean {close[0]}?' if close else ', and no part here reads it')
            )
        _check_items(cfg, key)


def _check_items(cfg: Config, key: str) -> None:
    """Lists are changed item by item, by number."""
    node, names = dict(cfg.items()), key.split('.')
    for i, name in enumerate(names):
        if isinstance(node, (list, tuple)):
            path = '.'.join(names[:i])
            if not name.isdecimal() or int(name) >= len(node):
                raise CommandError(
                    f'--cfg-options {key}: {path} is a list of {len(node)} in {cfg.filename}, '
                    f'of which {name} names none; give a number, such as {path}.0, or the whole '
                    f'list, as {path}=[...]'
                )
            node = node[int(name)]
        elif isinstance(node, dict):
            node = node.get(name)


def check_parts(cfg: Config, splits: tuple[str, ...] = SPLITS) -> None:
    """Raise CommandError if a part of a config cannot be built, before MMEngine writes logs.

    The model (on the CPU, in each process), the weights of its backbone, transforms, optimizer and
    schedules are made and thrown away; a small image goes through a model around a backbone of
    ours. So are hooks of ours and of hosts, and metrics of which it is known what they give, by
    which the best checkpoint may be chosen. Of the others, which may read data or belong to a run,
    only names and arguments are looked at.

    Args:
        cfg: The whole config.
        splits: Which data loaders and evaluators are used. Defaults to all.
    """
    cfg = copy.deepcopy(cfg)  # what builds a part may change it
    if cfg.setdefault('default_scope', 'mmengine') is None:  # the default is the Runner's
        raise CommandError(f'{cfg.filename} has no default_scope; set it to one of {[*SIZES]}')
    with _unnoticed():
        init_default_scope(cfg.default_scope)
        _check_environment(cfg)
        check_backbone(cfg)
        model = build_model(cfg)
        _check_pixels(model, cfg)
        if has_our_backbone(cfg):
            _load_pretrained(model.backbone)
            if 'train' in splits:
                _load_whole(model, cfg)
        _check_optimizer(model, cfg)
        if has_our_backbone(cfg) and (problem := widths_problem(model, cfg)):
            raise CommandError(f'{cfg.filename}: {problem}')
        metrics: list[set[str] | None] = []  # of the validation
        for part, registry, node in _parts(cfg, splits):
            if not isinstance(node, dict):
                continue
            with _blamed(cfg, part):
                if registry is TRANSFORMS:
                    registry.build(node)
                elif registry is HOOKS:
                    _check_hook(node, model, metrics, cfg.get('train_cfg') or {})
                elif node.get('type') is not None:
                    kind = _check_call(registry, node)
                    if registry is METRICS:
                        names = check_metric(kind, node, model)
                        metrics += [names] if part == 'val_evaluator' else []
        for split in splits:
            if loader := cfg.get(f'{split}_dataloader'):
                with _blamed(cfg, f'{split}_dataloader'):
                    _check_loader(loader, split)


def _check_environment(cfg: Config) -> None:
    """Look at what the Runner reads when it has made its work folder."""
    level = cfg.get('log_level', 'INFO')
    try:
        MMLogger('mmbiformer.log_level', log_level=level)
    except Exception as error:
        raise CommandError(
            f'{cfg.filename}: log_level={level!r:.80} must be DEBUG, INFO, WARNING, ERROR or '
            'CRITICAL, or an int'
        ) from error
    # The Runner has defaults for what is missing, not for None.
    randomness, environment = cfg.get('randomness', dict(seed=None)), cfg.get('env_cfg', {})
    _require_kind(cfg, 'randomness', randomness, (dict,))
    _require_kind(cfg, 'env_cfg', environment, (dict,))
    with _blamed(cfg, 'randomness'):
        _check_arguments(Runner.set_randomness, None, **randomness)
    seed = randomness['seed']
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise CommandError(
            f'{cfg.filename}: randomness.seed={seed!r:.80} must be an int from 0 to 2**32 - 1, or '
            'None for a random one'
        )
    processes, limit = environment.get('mp_cfg', {}), environment.get('resource_limit', 0)
    _require_kind(cfg, 'env_cfg.resource_limit', limit, (int, float))
    _require_kind(cfg, 'env_cfg.dist_cfg', environment.get('dist_cfg'), (dict, type(None)))
    _require_kind(cfg, 'env_cfg.mp_cfg', processes, (dict,))
    with _blamed(cfg, 'env_cfg.mp_cfg'):
        _check_arguments(set_multi_processing, **processes)
    threads = processes.get('opencv_num_threads', 0)
    _require_kind(cfg, 'env_cfg.mp_cfg.opencv_num_threads', threads, (int,))
    methods = multiprocessing.get_all_start_methods()
    if (method := processes.get('mp_start_method')) not in (None, *methods):
        raise CommandError(
            f'{cfg.filename}: env_cfg.mp_cfg.mp_start_method={method!r:.80} must be one of '
            f'{methods}'
        )
    visualizer = cfg.get('visualizer')
    if visualizer is not None:
        with _blamed(cfg, 'visualizer'):
            _check_call(VISUALIZERS, visualizer)
        _require_kind(cfg, 'visualizer.name', visualizer.get('name'), (str, type(None)))
        backends = visualizer.get('vis_backends') or ()
        _require_kind(cfg, 'visualizer.vis_backends', backends, (dict, list, tuple))
        for backend in [backends] if isinstance(backends, dict) else backends:
            _require_kind(cfg, 'one of visualizer.vis_backends', backend, (dict,))
            with _blamed(cfg, 'visualizer.vis_backends'):
                # Of its name, only the visualizer hears.
                _check_call(VISBACKENDS, {k: v for k, v in backend.items() if k != 'name'})
            _require_package(cfg, backend['type'])
    with _blamed(cfg, 'log_processor'):
        _check_call(LOG_PROCESSORS, {'type': 'LogProcessor', **(cfg.get('log_processor') or {})})


def _require_package(cfg: Config, backend: str | type) -> None:
    """MMEngine's backends import what they write with when they first do, in the work folder."""
    name = backend if isinstance(backend, str) else backend.__name__
    package = PACKAGES.get(name.rpartition('.')[2])
    if package is not None and importlib.util.find_spec(package) is None:
        raise CommandError(
            f'{cfg.filename}: {name} in visualizer.vis_backends needs the package {package}, which '
            f'is not installed; `pip install {package}`, or take {name} out'
        )


def _check_arguments(function: Callable, *args: Any, **kwargs: Any) -> None:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(str(error)) from error  # of which no line of code is told


def check_backbone(cfg: Config) -> None:
    """Raise CommandError if a backbone of ours cannot be built, before MMEngine writes logs.

    Args:
        cfg: The whole config.
    """
    if not has_our_backbone(cfg):
        return
    backbone = cfg.model.backbone
    try:
        MODELS.build({**backbone, 'init_cfg': None})
    except Exception as error:
        raise CommandError(f'{cfg.filename}: model.backbone: {error_text(error)}') from error
    init_cfg = backbone.get('init_cfg') or {}
    if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
        _require_kind(cfg, 'model.backbone.init_cfg.checkpoint', init_cfg.get('checkpoint'), (str,))
        check_file(init_cfg['checkpoint'], 'model.backbone.init_cfg')


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config by itself.

    Args:
        cfg: The whole config; changed in place.

    Raises:
        CommandError: If the config's values do not fit.
    """
    if cfg.get('default_scope') is None:
        raise CommandError(f'{cfg.filename} has no default_scope; set it to one of {[*SIZES]}')
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:  # as the Runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    try:
        return MODELS.build(cfg.model)
    except Exception as error:  # a model is made of the config alone
        raise CommandError(
            f'{cfg.filename}: the model cannot be built: {error_text(error)}'
        ) from error


def _check_kinds(
    cfg: Config, node: Any, kinds: dict[tuple[type, ...], str], prefix: str = ''
) -> None:
    for wanted, names in kinds.items():
        for name in names.split():
            _require_kind(cfg, prefix + name, node.get(name), (*wanted, type(None)))


def _require_kind(cfg: Config, name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return
    wanted = ' or '.join(kind.__name__ for kind in kinds if kind not in (tuple, type(None)))
    raise CommandError(f'{cfg.filename}: {name}={value!r:.80} must be {_a(wanted)}')


def _a(noun: str) -> str:
    return f'{"an" if noun[0] in "aeiou" else "a"} {noun}'


def _parts(cfg: Config, splits: tuple[str, ...]) -> Iterator[tuple[str, Registry, Any]]:
    """Parts of a config that are looked at one by one: setting, registry, value."""
    for split in splits:
        if loader := cfg.get(f'{split}_dataloader'):
            for dataset in _datasets(loader.dataset):
                yield f'{split}_dataloader', DATASETS, dataset
                for step in dataset.get('pipeline') or ():
                    yield f'{split}_dataloader', TRANSFORMS, step
            for name in ('sampler', 'batch_sampler'):
                yield f'{split}_dataloader', DATA_SAMPLERS, loader.get(name)
            for name in ('collate_fn', 'worker_init_fn'):
                yield f'{split}_dataloader', FUNCTIONS, loader.get(name)
        yield f'{split}_cfg', LOOPS, _loop(cfg.get(f'{split}_cfg'), split)
    evaluators = [(f'{split}_evaluator', METRICS) for split in splits]
    for name, registry in (*evaluators, ('custom_hooks', HOOKS)):
        nodes = cfg.get(name) or ()
        for node in nodes if isinstance(nodes, (list, tuple)) else [nodes]:
            if 'metrics' not in node:  # a whole evaluator
                yield name, registry, node
    for name, node in (cfg.get('default_hooks') or {}).items():
        yield f'default_hooks.{name}', HOOKS, node


def _loop(node: Any, split: str) -> Any:
    """A loop with its type, as the Runner chooses it."""
    if not isinstance(node, dict) or 'type' in node:
        return node
    if split != 'train':
        return dict(node, type=f'{split.title()}Loop')
    kind = 'EpochBasedTrainLoop' if node.get('by_epoch') else 'IterBasedTrainLoop'
    return dict({name: node[name] for name in node if name != 'by_epoch'}, type=kind)


def _check_pixels(model: nn.Module, cfg: Config) -> None:
    """By a std of 0 every loss would be nan, and one mean too many fails when images come."""
    for preprocessor in model.modules():
        if not isinstance(preprocessor, BaseDataPreprocessor):
            continue
        for name in ('mean', 'std'):
            values = getattr(preprocessor, name, None)
            if not isinstance(values, torch.Tensor):
                continue
            shown = ', '.join(f'{value:g}' for value in values.flatten().tolist())
            given = f'{cfg.filename}: data_preprocessor.{name}=[{shown}]'
            if has_our_backbone(cfg) and values.numel() not in (1, CHANNELS):
                raise CommandError(
                    f'{given} must have one value, or one for each of the {CHANNELS} channels'
                )
            if not values.isfinite().all() or (name == 'std' and not (values > 0).all()):
                above = ' above 0, by which pixels are divided' if name == 'std' else ''
                raise CommandError(f'{given} must be finite numbers{above}')


def _check_optimizer(model: nn.Module, cfg: Config) -> None:
    node = cfg.get('optim_wrapper')
    if node is None or 'runner_type' in cfg:  # others than MMEngine's Runner wrap the model first
        return
    with _blamed(cfg, 'optim_wrapper'):
        if isinstance(node.get('optimizer'), dict):
            _check_call(OPTIMIZERS, node.optimizer)  # or the failure would not name it
        if isinstance(node.get('clip_grad'), dict):
            clip = dict(node.clip_grad)
            function = getattr(nn.utils, f'clip_grad_{clip.pop("type", "norm")}_')
            if unknown := clip.keys() - inspect.signature(function).parameters:
                raise ValueError(f'clip_grad takes no argument {unknown.pop()!r}')
            for name in ('max_norm', 'clip_value'):  # below, gradients would change their sign
                value = clip.get(name, 1)
                if not (isinstance(value, (int, float)) and value > 0):
                    raise ValueError(f'clip_grad.{name}={value!r:.80} must be a number above 0')
        if cfg.get('launcher', 'none') != 'none' and not torch.distributed.is_initialized():
            return  # some optimizers speak to the other processes
        with _with_values(node):
            wrapper = build_optim_wrapper(model, node)
    if isinstance(wrapper, OptimWrapperDict):
        return  # several, each with schedules of its own
    schedules = cfg.get('param_scheduler') or ()
    for schedule in schedules if isinstance(schedules, (list, tuple)) else [schedules]:
        schedule.pop('convert_to_iter_based', None)
        with _blamed(cfg, 'param_scheduler'):
            _check_call(PARAM_SCHEDULERS, schedule)
            PARAM_SCHEDULERS.build(schedule, default_args=dict(optimizer=wrapper))


def _check_hook(node: dict, model: nn.Module, metrics: list[set[str] | None], loop: dict) -> None:
    """Make a hook of ours or of a host, which do no more then than look at their arguments.

    Args:
        node: Its part of the config.
        model: The whole model.
        metrics: For each evaluator the names of what it gives, None where they are not known.
        loop: The setting train_cfg, empty where nothing is trained.
    """
    kind = _check_call(HOOKS, node)
    node = dict(node)
    get_priority(node.pop('priority', 50))
    if kind.__module__.split('.')[0] not in ('mmbiformer', 'mmengine', *SIZES):
        return
    with _with_values(node):
        hook = HOOKS.build(node)
        if isinstance(hook, EMAHook):
            _check_average(hook, model, loop)
    if not metrics or None in metrics:
        return
    known = {'auto'}.union(*metrics)
    for name in ('save_best', 'monitor'):  # of checkpoints, and of early stopping
        value = getattr(hook, name, None) or []
        for wanted in [value] if isinstance(value, str) else value:
            if wanted not in known:
                raise ValueError(
                    f'{name}={wanted!r}, but val_evaluator gives {sorted(known - {"auto"})}'
                )


def _check_average(hook: EMAHook, model: nn.Module, loop: dict) -> None:
    average = MODELS.build(hook.ema_cfg, default_args=dict(model=model))
    if getattr(average, 'interval', 1) == 0:
        raise ValueError('interval must not be 0')
    if not loop.get('by_epoch', True) and hook.begin_epoch:
        raise ValueError(
            'begin_epoch counts epochs, but train_cfg has by_epoch=False; set begin_iter'
        )
    for name, limit in (('begin_epoch', 'max_epochs'), ('begin_iter', 'max_iters')):
        end = loop.get(limit)
        if end is not None and getattr(hook, name) > end:
            raise ValueError(f'with train_cfg.{limit}={end}, {name} is never reached')


def _check_call(registry: Registry, node: dict) -> Callable:
    """Raise an error if a type or an argument is unknown, or a text or list is no number.

    Returns:
        Callable: What the type is.
    """
    if node.get('type') is None:
        raise KeyError(f"it has no 'type', but {dict(node)!r:.80}")
    with registry.switch_scope_and_registry(node.get('_scope_')) as found:
        kind = node['type'] if inspect.isclass(node['type']) else found.get(node['type'])
    if kind is None:
        raise KeyError(f'{node["type"]} is not in the {registry.name} registry')
    parameters = dict(inspect.signature(kind).parameters)
    others = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if others and inspect.isclass(kind):  # mostly they go to the classes it derives from
        for base in kind.__mro__[1:-1]:
            with contextlib.suppress(TypeError, ValueError):  # builtin ones have no signature
                parameters = {**inspect.signature(base).parameters, **parameters}
    for name, value in node.items():
        if name in ('type', '_scope_', 'priority'):
            continue
        if name not in parameters and not others:
            raise ValueError(f'{kind.__name__} takes no argument {name!r}, but {[*parameters]}')
        wanted = getattr(parameters.get(name), 'annotation', None)
        kinds = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
        # Of others, annotations may be less than the truth.
        trusted = kind.__module__.split('.')[0] in ('mmbiformer', 'mmengine', 'torch', *SIZES)
        numeric = trusted and {*kinds} <= {int, float, bool, type(None)}
        text = registry is HOOKS and trusted and {*kinds} <= {str, Path, type(None)}  # as folders
        whole = registry is HOOKS and {*kinds} <= {int, type(None)}  # intervals, which are modulos
        if numeric and isinstance(value, (str, list, dict, *([float] if whole else []))):
            raise ValueError(f'{name}={value!r} of {kind.__name__} must be {_a(kinds[0].__name__)}')
        if text and isinstance(value, (int, float, list, dict)):
            raise ValueError(f'{name}={value!r} of {kind.__name__} must be a str')
    return kind


def _check_loader(loader: ConfigDict, split: str) -> None:
    """Make a data loader like it that reads nothing; what of it is torch's is known then."""
    if 'sampler' not in loader:
        raise KeyError('it has no sampler = dict(...)')
    of_mmengine = {'dataset', 'sampler', 'batch_sampler', 'collate_fn', 'worker_init_fn'}
    of_mmengine |= {'num_batch_per_epoch', 'disable_subprocess_warning'}
    rest = {name: value for name, value in loader.items() if name not in of_mmengine}
    _check_arguments(DataLoader, range(1), **rest)
    with _with_values(rest):
        DataLoader(range(1), **rest)
        if rest.get('prefetch_factor') == 0:  # which workers find out
            raise ValueError('prefetch_factor must be positive, or None')
        if (rest.get('num_workers') or 0) > MOST_WORKERS:
            raise ValueError(f'num_workers must be at most {MOST_WORKERS}, as each is a process')
        if split != 'train' and rest.get('drop_last') and (rest.get('batch_size') or 1) > 1:
            raise ValueError('drop_last=True would leave images of the last batch out of the score')


def _load_pretrained(backbone: nn.Module) -> None:
    init_cfg = getattr(backbone, 'init_cfg', None)
    if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
        backbone.init_weights()


def _load_whole(model: nn.Module, cfg: Config) -> None:
    """What a run begins with; of what it resumes, other checks know more."""
    path = cfg.get('load_from')
    if path and '://' not in path and not cfg.get('resume'):
        with named(path):
            load_checkpoint(model, path, 'cpu', logger='silent', revise_keys=[(r'^module\.', '')])


@contextlib.contextmanager
def _with_values(node: dict) -> Iterator[None]:
    """Let errors end with what was given."""
    try:
        yield
    except Exception as error:
        given = ', '.join(f'{name}={node[name]!r:.80}' for name in node if name != '_scope_')
        raise ValueError(f'{error_text(error)} (given: {given})') from error


@contextlib.contextmanager
def _blamed(cfg: Config, part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CommandError(not_built(cfg, part, error)) from error


def not_built(cfg: Config, part: str, error: Exception) -> str:
    """What to tell the user if a part of the config cannot be built.

    Args:
        cfg: The whole config.
        part: The setting.
        error: What it failed with.
    """
    text = error_text(error).partition('. Please check')[0].rstrip('.')
    return f'{part} of {cfg.filename} cannot be built: {text}. Mend the name or the value there'


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """Let what is built for a look neither log nor draw random numbers that the run would miss."""
    name = 'mmbiformer.checks'
    MMLogger.get_instance(name, log_level='CRITICAL')  # the last one made is the current one
    Visualizer.get_instance(name)  # for hooks, which ask for the current one
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        MMLogger._instance_dict.pop(name)
        Visualizer._instance_dict.pop(name)


def has_our_backbone(cfg: Config) -> bool:
    return type_name(cfg.model.get('backbone')).startswith('mmbiformer.')


def error_text(error: Exception) -> str:
    """What an error says, and where it came from unless it is one that checks of values raise.

    Args:
        error: Any error. (A KeyError would quote what it says.)
    """
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, KeyError) and text.isidentifier():
        text = f'there is no {text!r}'
    if text and isinstance(error, (ImportError, KeyError, ValueError)):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = ''.join(f' ({Path(frame.filename).name}, line {frame.lineno})' for frame in last)
    return f'{type(error).__name__}: {text}{where}' if text else f'{type(error).__name__}{where}'


def escaped(text: str) -> str:
    """A text without characters that terminals obey: names in it may be a stranger's.

    Args:
        text: Any text; its lines are kept.
    """
    return ''.join(
        letter if letter.isprintable() or letter == '\n' else ascii(letter)[1:-1] for letter in text
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice; torch's error on CPU has no class of its own.

    Args:
        error: Any error.
    """
    text = re.search(r'(?:out of|t allocate) memory', str(error), re.IGNORECASE)
    return isinstance(error, MemoryError) or bool(text)


def disk_problem(error: Exception) -> str | None:
    """What to tell the user of a disk, or of permissions; None if an error is of something else.

    Args:
        error: Any error. If it does not name the file, that is one that was open where it came
            from.
    """
    if not isinstance(error, OSError) or error.errno not in DISK:
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    values = (value for frame in reversed(frames) for value in frame.f_locals.values())
    streams = (getattr(value, 'stream', value) for value in values)  # a handler of logs has one
    names = (
        stream.name
        for stream in streams
        if isinstance(stream, io.IOBase) and hasattr(stream, 'name')
    )
    return file_problem(error, error.filename2 or error.filename or next(names, 'a file'))


def file_problem(error: OSError, path: Any) -> str:
    """What to tell the user of a file that cannot be opened, read or written.

    Args:
        error: What the system said.
        path: The file.
    """
    return (
        f'{path}: {error.strerror or error}; it must be there, of the right kind, and yours to '
        'read or write, on a disk with room'
    )


def is_of_other_process(error: Exception) -> bool:
    """Whether what failed is the talk with another process, which has ended.

    Args:
        error: Any error.
    """
    text = r'[Cc]onnection (?:closed|reset) by peer|Connection refused|(?<!DataLoader )timed? ?out'
    return bool(re.search(text, str(error)))


def type_name(node: Any) -> str:
    """The type in a config as text; new-style configs have the class itself.

    Args:
        node: A part of a config.
    """
    kind = node.get('type') if isinstance(node, dict) else None
    return (
        f'{kind.__module__.split(".")[0]}.{kind.__name__}' if inspect.isclass(kind) else str(kind)
    )


def _datasets_of(cfg: Config, splits: tuple[str, ...]) -> Iterator[tuple[str, ConfigDict]]:
    """The data sets of splits, without wrappers, each with its split."""
    for split in splits:
        if loader := cfg.get(f'{split}_dataloader'):
            for dataset in _datasets(loader.dataset):
                yield split, dataset


def _datasets(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = dataset.get('dataset') or dataset.get('datasets')
    children = inner if isinstance(inner, (list, tuple)) else [inner]
    if all(isinstance(child, dict) for child in children):
        for child in children:
            yield from _datasets(child)
    else:  # what it holds is something of its own
        yield dataset


def _ann_file(dataset: ConfigDict) -> str:
    """The annotation file, or nothing."""
    path, root = dataset.get('ann_file'), dataset.get('data_root')
    if not isinstance(path, str) or not path:
        return ''
    return os.path.join(root if isinstance(root, str) else '', path).rstrip('/')


def _paths(dataset: ConfigDict) -> Iterator[str]:
    """The annotation file and the folders that a data set reads."""
    root = dataset.get('data_root')
    root = root if isinstance(root, str) else ''
    parts: list[Any] = [dataset.get('ann_file')]
    prefix = dataset.get('data_prefix') or {}
    parts += prefix.values() if isinstance(prefix, dict) else [prefix]
    if not any(parts):
        parts = [dataset.get('split') or '']
    for part in parts:
        if isinstance(part, str) and (part or root):
            yield os.path.join(root, part).rstrip('/')
