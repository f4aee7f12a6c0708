#!/usr/bin/env bash
# MMEngine: processes of one training validate with different models, and only one of them is saved.
#
# Version:  onedl-mmengine 0.10.12, torch 2.11.0.
# Expected: the figure of a validation is that of the model in the checkpoint.
# Seen:     MMEngine wraps the model with `broadcast_buffers=False`, where PyTorch's default is
#           True. So the running averages of a BatchNorm are each process's own, and each validates
#           its share of the images with its own. The checkpoint holds those of process 0.
#
# Output:   running mean that process 0 validates with 0.10, process 1 0.19, in the checkpoint 0.10
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
python=$folder/env/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if command -v uv >/dev/null; then install() { uv pip install --quiet --python "$python" "$@"; }; fi
install 'torch==2.11.0' 'numpy==2.2.6' 'onedl-mmengine==0.10.12' \
    'opencv-python-headless==4.12.0.88'
cd "$folder"

cat >run.py <<'PYTHON'
import os
import sys

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner

rank = int(sys.argv[1])
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
torch.distributed.init_process_group(
    'gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2
)


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)

    def forward(self, number, mode='tensor'):
        out = self.norm(number)
        return dict(loss=out.sum()) if mode == 'loss' else [out]


class Metric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(figure=1)


class Numbers(torch.utils.data.Dataset):
    """Even indices are 1 and go to process 0, odd ones are 1.9 and go to process 1."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return dict(number=torch.tensor([1.9 if i % 2 else 1.0]))


def loader():
    return dict(
        dataset=Numbers(),
        batch_size=4,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
        num_workers=0,
    )


runner = Runner(
    Model(),
    'work',
    train_dataloader=loader(),
    val_dataloader=loader(),
    train_cfg=dict(by_epoch=True, max_epochs=1),
    val_cfg=dict(),
    val_evaluator=[Metric()],
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
    launcher='pytorch',
    # What MMEngine makes itself on a GPU; on a CPU it would pass a device.
    cfg=dict(
        model_wrapper_cfg=dict(
            type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None
        )
    ),
)
runner.train()
means = [torch.zeros(1) for _ in range(2)]
torch.distributed.all_gather(means, runner.model.module.norm.running_mean)
if rank == 0:
    saved = torch.load('work/epoch_1.pth', weights_only=False)['state_dict']['norm.running_mean']
    print(
        f'running mean that process 0 validates with {means[0].item():.2f}, '
        f'process 1 {means[1].item():.2f}, in the checkpoint {saved.item():.2f}'
    )
    as_described = means[0] == saved and means[1] != saved
    sys.exit(0 if as_described else 'This has changed.')
PYTHON
"$python" run.py 1 "$folder/meet" >/dev/null 2>&1 &
"$python" run.py 0 "$folder/meet" 2>"$folder/log" | tail -n 1 || { tail -n 20 "$folder/log"; exit 1; }
wait
