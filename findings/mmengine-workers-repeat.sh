#!/usr/bin/env bash
# MMEngine: data loader workers draw the same random numbers in every epoch.
#
# Version:  onedl-mmengine 0.10.12 (and mmengine 0.10.7), torch 2.11.0.
# Expected: an epoch draws its random crops, flips and colours anew, as with PyTorch's DataLoader,
#           which gives its workers other seeds in every epoch.
# Seen:     the Runner seeds Python, NumPy and PyTorch in each worker with the run's seed, the rank
#           and the worker's number, but not the epoch. Workers start anew in every epoch unless
#           persistent_workers=True. So the n-th sample of each epoch gets the same numbers; only
#           the order of the images differs.
#
# Output:
#   epoch 1: images 2 3 1 0, random numbers 0.551 0.708 0.291 0.511
#   epoch 2: images 2 1 3 0, random numbers 0.551 0.708 0.291 0.511
#   epoch 3: images 3 1 0 2, random numbers 0.551 0.708 0.291 0.511
#   the same data in a DataLoader of PyTorch: 3 different rows in 3 epochs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
python=$folder/env/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if command -v uv >/dev/null; then install() { uv pip install --quiet --python "$python" "$@"; }; fi
install 'torch==2.11.0' 'numpy==2.2.6' 'onedl-mmengine==0.10.12' \
  'opencv-python-headless==4.12.0.88'

"$python" - "$folder" <<'PYTHON'
import sys

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset


class Images(Dataset):
    """Four images; each comes with a number that an augmentation would draw."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=index, drawn=np.random.rand())


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, inputs, drawn, mode):
        self.seen.append((int(inputs[0]), float(drawn[0])))
        return dict(loss=self.weight.sum())


model = Model()
Runner(
    model,
    work_dir=sys.argv[1],
    train_dataloader=dict(
        dataset=Images(), batch_size=1, num_workers=1, sampler=dict(type='DefaultSampler')
    ),
    train_cfg=dict(by_epoch=True, max_epochs=3),
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
    randomness=dict(seed=3),
    log_level='ERROR',
).train()

epochs = [model.seen[i : i + 4] for i in (0, 4, 8)]
for number, epoch in enumerate(epochs, 1):
    images = ' '.join(str(image) for image, _ in epoch)
    print(f'epoch {number}: images {images}, random numbers', *(f'{x:.3f}' for _, x in epoch))
mmengine = {tuple(x for _, x in epoch) for epoch in epochs}
loader = DataLoader(Images(), num_workers=1)
pytorch = {tuple(float(batch['drawn']) for batch in loader) for _ in epochs}
print(f'the same data in a DataLoader of PyTorch: {len(pytorch)} different rows in 3 epochs')
sys.exit(0 if (len(mmengine), len(pytorch)) == (1, 3) else 'This has changed.')
PYTHON
