"""A moving average of the weights that is kept, but not evaluated."""

from mmengine.hooks import EMAHook

from ..registry import HOOKS


@HOOKS.register_module()
class SideEMAHook(EMAHook):
    """MMEngine's EMAHook, with the averaged weights at the side of the raw ones.

    Validation, test and the ``state_dict`` of a checkpoint are those of the raw weights, which the
    authors of BiFormer publish; the average is saved as ``ema_state_dict`` and goes on after a
    resume. The arguments are those of :class:`mmengine.hooks.EMAHook`, which swaps the two instead.
    """

    def _swap_ema_parameters(self) -> None:
        """Leave the raw weights in the model while it is evaluated."""

    def _swap_ema_state_dict(self, checkpoint: dict) -> None:
        """Leave the raw weights in the ``state_dict`` of a checkpoint, and say so in it."""
        checkpoint['ema_at_side'] = True
