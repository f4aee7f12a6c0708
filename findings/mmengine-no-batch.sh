#!/usr/bin/env bash
# MMEngine: a training without a single batch runs, validates, saves and ends as a success.
#
# Version:  onedl-mmengine 0.10.12, torch 2.11.0.
# Expected: an error or a warning where `drop_last` leaves no batch, as there are fewer images than
#           `batch_size`: nothing can be learnt.
# Seen:     every epoch ends at once, the validation gives figures, checkpoints of the untouched
#           weights are written, and the exit status is 0. No line of the log warns of it.
#
# Output:   epochs 3, training steps 0, validations 3, checkpoints 3, weights changed: no, warnings: 0
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
import logging
import sys
from pathlib import Path

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner

steps, validations, warnings = [], [], []


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, number, mode='tensor'):
        if mode == 'loss':
            steps.append(1)
            return dict(loss=(self.weight * number).mean())
        return [self.weight]


class Metric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        validations.append(1)
        return dict(figure=len(results))


def loader(**more):
    return dict(
        dataset=[dict(number=torch.ones(())) for _ in range(3)],
        sampler=dict(type='DefaultSampler', shuffle=False),
        num_workers=0,
        **more,
    )


model = Model()
runner = Runner(
    model,
    'work',
    train_dataloader=loader(batch_size=4, drop_last=True),
    val_dataloader=loader(batch_size=1),
    train_cfg=dict(by_epoch=True, max_epochs=3),
    val_cfg=dict(),
    val_evaluator=[Metric()],
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
)
watch = logging.Handler(logging.WARNING)
watch.emit = lambda record: warnings.append(record.getMessage())
runner.logger.addHandler(watch)
runner.train()
files = len([*Path('work').glob('epoch_*.pth')])
changed = 'yes' if model.weight != 1 else 'no'
# Any training of this version has others.
kept = [text for text in warnings if {'batch', 'batches', 'empty', 'dataloader'} & {*text.split()}]
print(
    f'epochs {runner.epoch}, training steps {len(steps)}, validations {len(validations)}, '
    f'checkpoints {files}, weights changed: {changed}, warnings: {len(kept)}'
)
as_described = (len(steps), len(validations), files, changed, kept) == (0, 3, 3, 'no', [])
sys.exit(0 if as_described else 'This has changed.')
PYTHON
"$python" run.py 2>"$folder/log" | tail -n 1 || { tail -n 20 "$folder/log"; exit 1; }
