#!/usr/bin/env bash
# MMEngine: schedules with the same `end` arrive at different iterations, none of them there.
#
# Version:  onedl-mmengine 0.10.12 (and mmengine 0.10.7), torch 2.11.0.
# Expected: a warm-up, a polynomial and a cosine with begin=0 and end=N have arrived at iteration N,
#           as PyTorch's schedulers of the same names do with N iterations.
# Seen:     LinearLR and PolyLR arrive one iteration early: every step between is larger, and the
#           last iteration of a training by PolyLR to 0 changes nothing. CosineAnnealingLR goes
#           PyTorch's way and stops one iteration before it arrives: it never reaches its minimum.
#           A recipe of another framework needs end=N+1 for the first two.
#
# Output, learning rates of iterations 0 to 5 with N = 4:
#   warm-up from 0.2   PyTorch   0.200 0.400 0.600 0.800 1.000 1.000
#                      MMEngine  0.200 0.467 0.733 1.000 1.000 1.000
#   polynomial to 0    PyTorch   1.000 0.750 0.500 0.250 0.000 0.000
#                      MMEngine  1.000 0.667 0.333 0.000 0.000 0.000
#   cosine to 0        PyTorch   1.000 0.854 0.500 0.146 0.000 0.146
#                      MMEngine  1.000 0.854 0.500 0.146 0.146 0.146
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
python=$folder/env/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if command -v uv >/dev/null; then install() { uv pip install --quiet --python "$python" "$@"; }; fi
install 'torch==2.11.0' 'numpy==2.2.6' 'onedl-mmengine==0.10.12'

"$python" - <<'PYTHON'
import sys

import torch
from mmengine import optim
from torch.optim import lr_scheduler

N = 4


def rates(scheduler, **kwargs):
    """The learning rate that each of six iterations trains with; 1 without a schedule."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = scheduler(optimizer, **kwargs)
    found = []
    for _ in range(N + 2):
        found.append(f'{optimizer.param_groups[0]["lr"]:.3f}')
        optimizer.step()
        schedule.step()
    return ' '.join(found)


span = dict(by_epoch=False, begin=0, end=N)
as_described = True
for name, theirs, own, early in [
    (
        'warm-up from 0.2',
        rates(lr_scheduler.LinearLR, start_factor=0.2, total_iters=N),
        rates(optim.LinearLR, start_factor=0.2, **span),
        rates(lr_scheduler.LinearLR, start_factor=0.2, total_iters=N - 1),
    ),
    (
        'polynomial to 0',
        rates(lr_scheduler.PolynomialLR, total_iters=N),
        rates(optim.PolyLR, eta_min=0.0, **span),
        rates(lr_scheduler.PolynomialLR, total_iters=N - 1),
    ),
    (
        'cosine to 0',
        rates(lr_scheduler.CosineAnnealingLR, T_max=N),
        rates(optim.CosineAnnealingLR, eta_min=0.0, **span),
        '1.000 0.854 0.500 0.146 0.146 0.146',
    ),
]:
    print(f'{name:18} PyTorch   {theirs}\n{"":18} MMEngine  {own}')
    as_described &= own == early and own != theirs
sys.exit(0 if as_described else 'This has changed.')
PYTHON
