"""MMEngine's FlexibleRunner shards our backbone with FSDP, block by block, in two CPU processes."""

import functools
import os

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import FlexibleRunner
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from mmbiformer.commands.runner import build_model
from mmbiformer.models.hierarchical import Block
from mmbiformer.shapes import ShapesSpec, make_shapes
from mmbiformer.weights.read import read_checkpoint
from tests.helpers.configs import write_toy
from tests.helpers.processes import free_port

FULL = dict(
    state_dict_type='FULL_STATE_DICT',
    # With other settings torch's FSDP crashed on the CPU.
    state_dict_config=dict(type='FullStateDictConfig', rank0_only=False, offload_to_cpu=False),
    optim_state_dict_config=dict(
        type='FullOptimStateDictConfig', rank0_only=False, offload_to_cpu=False
    ),
)


def is_block(module):
    return isinstance(module, Block)


def work(rank, config, folder, port):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Block})
    wrapper = dict(
        type='MMFullyShardedDataParallel',
        use_orig_params=True,  # weight decay goes by the kind of parameter
        auto_wrap_policy=policy,
        device_id=torch.device('cpu'),
    )
    runner = FlexibleRunner(
        model=dict(cfg.model, data_preprocessor=cfg.data_preprocessor),
        work_dir=folder,
        strategy=dict(
            type='FSDPStrategy',
            model_wrapper=wrapper,
            state_dict_cfg=FULL,
            activation_checkpointing=dict(check_fn=is_block),
        ),
        train_dataloader=cfg.train_dataloader,
        optim_wrapper=cfg.optim_wrapper,
        train_cfg=dict(by_epoch=True, max_epochs=1),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        launcher='pytorch',
        default_scope=cfg.default_scope,
    )
    runner.train()
    parts = [m for m in runner.model.modules() if isinstance(m, FullyShardedDataParallel)]
    assert len(parts) == 1 + 4  # the whole model, and each block
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_write_one_whole_file(tmp_path):
    make_shapes(
        tmp_path / 'data',
        14,
        0,
        spec=ShapesSpec(size=(64, 64), objects=(1, 1), shape_size=(30, 60)),
        progress=False,
        format='imagenet',
    )
    changes = f"""
train_dataloader = dict(batch_size=4, dataset=dict(data_root='{tmp_path}/data'), **no_workers)
optim_wrapper = dict(clip_grad=None)
"""
    config = str(write_toy(tmp_path, 'demo/biformer_t_shapes', changes))
    args = (config, str(tmp_path / 'work'), free_port())
    torch.multiprocessing.spawn(work, args, nprocs=2)
    weights = read_checkpoint(tmp_path / 'work/epoch_1.pth')['state_dict']
    model = build_model(Config.fromfile(config))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)  # strict
    assert all(torch.isfinite(value).all() for value in weights.values())
    name = 'backbone.stages.3.0.mlp.fc2.weight'
    assert not torch.equal(weights[name], before[name])
