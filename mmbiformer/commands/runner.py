"""The runner that a config asks for, with what this project adds to it."""

import os
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.hooks import CheckpointHook
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from ..engine.hooks import CheckClassesHook
from ..engine.hooks.resume import find_whole_checkpoint
from ..errors import UserError
from ..models.base import Backbone
from ..registry import MODELS

STARTERS = 'tools/dist_train.sh or tools/dist_test.sh'


def build_runner(cfg: Config) -> Runner:
    """Build the runner, and with it the model.

    Args:
        cfg: The whole config; changed in place.

    Raises:
        UserError: If the launcher needs GPUs and there are none.
    """
    on_cpu = cfg.launcher != 'none' and get_device() == 'cpu'
    if on_cpu:
        distribute_on_cpu(cfg)
    use_own_checkpoint_hook(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    # MMEngine logs up to three lines for each parameter; the config says the same in a few.
    runner.logger.addFilter(lambda record: not str(record.msg).startswith('paramwise_options'))
    runner.register_hook(CheckClassesHook())
    if on_cpu:
        runner.logger.warning(
            f'No GPU: {runner.world_size} processes on CPU with the backend gloo.'
        )
    return runner


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config without a runner.

    Args:
        cfg: The whole config; changed in place.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if 'data_preprocessor' in cfg:  # as the Runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MMENGINE_MODELS.build(cfg.model)


def distribute_on_cpu(cfg: Config) -> None:
    """Join the other processes, and make the config fit, where MMEngine would call for a GPU.

    Args:
        cfg: The whole config; changed in place.

    Raises:
        UserError: If torchrun did not start the processes.
    """
    if cfg.launcher != 'pytorch' or 'RANK' not in os.environ:
        raise UserError(
            f'--launcher {cfg.launcher}: there is no GPU here; on CPU start several processes with '
            f'{STARTERS}'
        )
    cfg.pop('sync_bn', None)
    _replace_sync_bn(cfg.model)
    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = {**wrapper, 'device_ids': None}
    torch.distributed.init_process_group('gloo')


def _replace_sync_bn(node: Any) -> None:
    """PyTorch synchronises BatchNorm on GPUs only."""
    if isinstance(node, dict):
        if node.get('type') in ('SyncBN', 'MMSyncBN', nn.SyncBatchNorm):
            node['type'] = 'BN'
        node = [*node.values()]
    if isinstance(node, (list, tuple)):
        for child in node:
            _replace_sync_bn(child)


def use_own_checkpoint_hook(cfg: Config) -> None:
    """Let mmbiformer.CheckpointHook take the place of MMEngine's hook, with the same settings.

    Args:
        cfg: The whole config; changed in place.
    """
    hooks = cfg.default_hooks = cfg.get('default_hooks') or ConfigDict()
    hook = hooks.setdefault('checkpoint', ConfigDict(type='CheckpointHook'))
    names = 'CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook
    if hook and hook.get('type') in names:
        hook.type = 'mmbiformer.CheckpointHook'


def choose_checkpoint(cfg: Config, resume: str | None) -> list[str]:
    """Decide from which checkpoint a training goes on, if from any.

    Where the work folder has no checkpoint yet, the run starts as it would without ``--resume``.

    Args:
        cfg: The whole config; changed in place.
        resume: A checkpoint, or ``'auto'`` for the latest in the work folder, or None for what the
            config says.

    Returns:
        list[str]: Warnings about damaged files that were passed over.

    Raises:
        UserError: If there is no such file, or none that a training can go on from.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    warnings = []
    if resume == 'auto':
        out_dir = (cfg.get('default_hooks', {}).get('checkpoint') or {}).get('out_dir')
        if out_dir is not None:  # MMEngine's hook writes into a folder in it
            out_dir = os.path.join(out_dir, os.path.basename(os.path.abspath(cfg.work_dir)))
        resume, warnings = find_whole_checkpoint(cfg.work_dir, out_dir)
    cfg.resume = resume is not None
    if cfg.resume:
        cfg.load_from = resume
    return warnings


def use_pretrained(cfg: Config, checkpoint: str | None) -> None:
    """Set the file of the backbone's weights.

    Args:
        cfg: The whole config; changed in place.
        checkpoint: Path or URL, or None to leave the config as it is.

    Raises:
        UserError: If the model has no part ``backbone``.
    """
    if checkpoint is None:
        return
    if not isinstance(cfg.model.get('backbone'), dict):
        raise UserError(
            f'--pretrained: the model of {cfg.filename} has no part backbone; set init_cfg of its '
            'backbone in the config'
        )
    cfg.model.backbone.init_cfg = ConfigDict(type='Pretrained', checkpoint=checkpoint)


def random_weights_message(cfg: Config) -> str | None:
    """Say that a detector's or segmentor's backbone of ours starts from random weights, or None."""
    backbone = cfg.model.get('backbone')
    if not isinstance(backbone, dict) or cfg.get('load_from') or backbone.get('init_cfg'):
        return None
    if cfg.get('default_scope') == 'mmpretrain':  # whose classifiers start so
        return None
    kind = backbone.get('type')
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(kind, type) and issubclass(kind, Backbone)):
        return None
    return (
        'The backbone starts from random weights. Published figures of detection and segmentation '
        f'need the ImageNet weights that the authors publish at {kind.authors_page}: download a '
        'file and give it as --pretrained FILE.'
    )


def drop_amp_without_gpu(cfg: Config) -> str | None:
    """Train in float32 on CPU, where MMEngine has no mixed precision.

    Args:
        cfg: The whole config; changed in place.

    Returns:
        str | None: A warning, if anything was changed.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    if wrapper.get('type') != 'AmpOptimWrapper' or torch.cuda.is_available():
        return None
    wrapper.type = 'OptimWrapper'
    for key in ('loss_scale', 'dtype'):
        wrapper.pop(key, None)
    return 'No GPU: training in float32 instead of mixed precision.'
