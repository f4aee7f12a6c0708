"""Child registries of MMEngine's, under the scope ``mmbiformer``.

``type='mmbiformer.BiFormer'`` builds under the default scope of any host library: MMEngine imports
this module, and from it the ``locations``, the first time it meets the prefix.
"""

from typing import Any

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_PARAM_SCHEDULERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry as MMEngineRegistry


class Registry(MMEngineRegistry):
    """A registry that finds its own entries under any default scope.

    MMEngine's registry would ask the registry of the default scope instead of itself
    (findings/mmengine-registry-scope.sh).
    """

    def build(self, cfg: dict, *args: Any, **kwargs: Any) -> Any:
        self.import_from_location()
        if isinstance(cfg, dict) and cfg.get('type') in self.module_dict:
            cfg = {**cfg, '_scope_': self.scope}
        return super().build(cfg, *args, **kwargs)


def _child(name: str, parent: MMEngineRegistry, *locations: str) -> Registry:
    return Registry(name, parent=parent, scope='mmbiformer', locations=[*locations])


# With the models comes the reader of their checkpoints.
MODELS = _child('model', MMENGINE_MODELS, 'mmbiformer.models', 'mmbiformer.weights')
# These stand on MMPretrain, which has the data sets of images and classes.
DATASETS = _child('dataset', MMENGINE_DATASETS, 'mmbiformer.datasets.class_folders')
TRANSFORMS = _child('transform', MMENGINE_TRANSFORMS, 'mmbiformer.datasets')
HOOKS = _child('hook', MMENGINE_HOOKS, 'mmbiformer.engine')
PARAM_SCHEDULERS = _child('parameter scheduler', MMENGINE_PARAM_SCHEDULERS, 'mmbiformer.engine')
OPTIM_WRAPPER_CONSTRUCTORS = _child(
    'optimizer wrapper constructor', MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS, 'mmbiformer.engine'
)
