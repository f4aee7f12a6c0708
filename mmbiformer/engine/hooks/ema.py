"""A moving average of the weights that is saved, but not evaluated."""

from mmengine.hooks import EMAHook

from ...registry import HOOKS


@HOOKS.register_module()
class SideEMAHook(EMAHook):
    """MMEngine's ``EMAHook``, with the average beside the raw weights.

    MMEngine's hook swaps the two. Here validation, test and the ``state_dict`` of a checkpoint use
    the raw weights, as the authors of BiFormer do. The average is saved as ``ema_state_dict`` and
    goes on after a resume. The arguments are those of :class:`mmengine.hooks.EMAHook`.
    """

    def _swap_ema_parameters(self) -> None:
        """Leave the raw weights in the model while it is evaluated."""

    def _swap_ema_state_dict(self, checkpoint: dict) -> None:
        """Leave the raw weights in the ``state_dict`` of a checkpoint, and mark it so."""
        checkpoint['ema_at_side'] = True
