"""Whether a training is long enough to learn."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.optim.scheduler.param_scheduler import ConstantParamScheduler, LinearParamScheduler
from mmengine.runner import Runner

from ...registry import HOOKS
from ..schedulers import LaggingCosineLR


@HOOKS.register_module()
class CheckLengthHook(Hook):
    """Warn if the learning rate still rises when the training ends, or if there is no batch.

    Batches and warm-ups of the recipes are meant for COCO, ADE20K and ImageNet. A few dozen images
    never leave such a warm-up, or do not fill a batch.
    """

    def before_train(self, runner: Runner) -> None:
        """Compare the schedulers, as they were built, with the length of the training."""
        if getattr(runner.train_loop, 'max_iters', None) == 0:
            runner.logger.warning(
                'The training has no batch: drop_last is set and the images do not fill one. Lower '
                'batch_size in train_dataloader; see "A small data set" in docs/training.md.'
            )
            return
        found = runner.param_schedulers or []
        if isinstance(found, dict):  # of several optimizers
            found = [scheduler for each in found.values() for scheduler in each]
        for scheduler in found:
            unit, name = ('epochs',) * 2 if scheduler.by_epoch else ('iterations', 'iters')
            length = getattr(runner.train_loop, f'max_{name}', None)
            if length and (end := _end_of_warm_up(scheduler)) > length:
                runner.logger.warning(
                    f'The learning rate rises for {end} {unit} and the training has {length}: the '
                    'full rate is never reached. Shorten the warm-up in param_scheduler, or train '
                    'longer; see "A small data set" in docs/training.md.'
                )
                return


def _end_of_warm_up(scheduler: Any) -> int:
    """The step after which a scheduler no longer raises the learning rate; 0 if it never does."""
    if isinstance(scheduler, LaggingCosineLR):
        return scheduler.begin + scheduler.warmup_epochs
    if isinstance(scheduler, LinearParamScheduler):
        rises = scheduler.start_factor < scheduler.end_factor
    elif isinstance(scheduler, ConstantParamScheduler):
        rises = scheduler.factor < 1
    else:
        rises = 'Warmup' in type(scheduler).__name__  # mmdet's QuadraticWarmupLR
    return scheduler.end if rises and scheduler.param_name == 'lr' else 0
