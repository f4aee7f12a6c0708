"""The learning rate schedule of DeiT's training script."""

import math
from typing import Any

from mmengine.optim import _ParamScheduler

from ...registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class LaggingCosineLR(_ParamScheduler):
    """Linear warm-up, then a cosine, both one epoch late.

    In epoch e (from 0) the learning rate is that of t = max(e - 1, 0), because the script sets it
    at the end of an epoch from the number of that epoch. (BiXT's script sets it from the number of
    the next: ``lag=0``.) The cosine runs over t / ``T_max`` and is not shifted by the warm-up.
    Start and end are absolute values. No product of MMEngine's schedulers gives this schedule.

    Args:
        optimizer: Optimizer or wrapped optimizer.
        T_max: Epochs of the cosine.
        eta_min: Learning rate at the end of the cosine.
        warmup_epochs: Epochs of the warm-up.
        warmup_start: Learning rate at the start of the warm-up.
        lag: Epochs by which the schedule is late. Defaults to 1.
        **kwargs: ``begin``, ``end``, ``last_step`` and ``verbose`` of MMEngine's schedulers.
    """

    def __init__(
        self,
        optimizer: Any,
        T_max: int,
        eta_min: float,
        warmup_epochs: int,
        warmup_start: float,
        lag: int = 1,
        **kwargs: Any,
    ) -> None:
        self.T_max = T_max
        self.eta_min = eta_min
        self.warmup_epochs = warmup_epochs
        self.warmup_start = warmup_start
        self.lag = lag
        super().__init__(optimizer, 'lr', **kwargs)

    def _get_value(self) -> list[float]:
        t = max(self.last_step - self.lag, 0)
        if t < self.warmup_epochs:
            start, share = self.warmup_start, t / self.warmup_epochs
        else:
            start, share = self.eta_min, (1 + math.cos(math.pi * t / self.T_max)) / 2
        return [start + (base - start) * share for base in self.base_values]
