"""Layer-wise learning rate decay, in any host library."""

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ...registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, with a learning rate that falls towards the first layers.

    The learning rate of a parameter in layer i of n is multiplied by
    ``layer_decay_rate ** (n - 1 - i)``, so neck and heads keep the full one. The backbone says in
    which layer a parameter is: ``get_layer_depth(param_name, prefix)`` gives (i, n), as in
    MMPretrain. MMPretrain's own constructor asks the whole model; those of MMDetection and
    MMSegmentation know a few backbones by name.

    Args:
        optim_wrapper_cfg (dict): As in MMEngine.
        paramwise_cfg (dict): ``layer_decay_rate`` (float), in (0, 1]; and MMEngine's own keys,
            which rule weight decay and multipliers as before.

    Raises:
        ValueError: If ``layer_decay_rate`` is missing or out of range, or no part of the model has
            ``get_layer_depth``.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate={rate} must be a number in (0, 1], such as 0.9'
            )
        self.layer_decay_rate = rate

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: bool | None = None,
    ) -> None:
        """Add a group for each parameter; at the root, scale the learning rates.

        Args:
            params: Groups; changed in place.
            module: The module to add.
            prefix: Its name in the model.
            is_dcn_module: As in MMEngine.
        """
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:
            return
        parts = {
            f'{name}.': part
            for name, part in module.named_modules()
            if name and hasattr(part, 'get_layer_depth')
        }
        # MMPretrain's classifiers have the method too, and hand it on to their backbone.
        backbones = {
            name: part
            for name, part in parts.items()
            if not any(other != name and other.startswith(name) for other in parts)
        }
        if not backbones:
            raise ValueError(
                'layer-wise learning rate decay needs a backbone with get_layer_depth(param_name, '
                f'prefix); {type(module).__name__} has none'
            )
        names = {param: name for name, param in module.named_parameters()}
        for group in params:
            param_name = names[group['params'][0]]
            for name, backbone in backbones.items():
                if param_name.startswith(name):
                    layer, num_layers = backbone.get_layer_depth(param_name, name)
                    scale = self.layer_decay_rate ** (num_layers - 1 - layer)
                    group['lr'] = group.get('lr', self.base_lr) * scale
                    group['lr_scale'] = scale
