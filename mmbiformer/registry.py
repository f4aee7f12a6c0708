"""Child registries of MMEngine's, under the scope ``mmbiformer``.

``type='mmbiformer.BiFormer'`` builds under the default scope of any host library: MMEngine imports
this module, and from it the ``locations``, the first time it meets the prefix.
"""

from typing import Any

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_PARAM_SCHEDULERS
from mmengine.registry import Registry as MMEngineRegistry


class Registry(MMEngineRegistry):
    """A registry that finds its own entries whatever the default scope is.

    MMEngine's asks the registry of the default scope instead of the one whose ``build`` is called.
    """

    def build(self, cfg: dict, *args: Any, **kwargs: Any) -> Any:
        self.import_from_location()
        if isinstance(cfg, dict) and cfg.get('type') in self.module_dict:
            cfg = {**cfg, '_scope_': self.scope}
        return super().build(cfg, *args, **kwargs)


MODELS = Registry(
    'model', parent=MMENGINE_MODELS, scope='mmbiformer', locations=['mmbiformer.models']
)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmbiformer', locations=['mmbiformer.engine'])
PARAM_SCHEDULERS = Registry(
    'parameter scheduler',
    parent=MMENGINE_PARAM_SCHEDULERS,
    scope='mmbiformer',
    locations=['mmbiformer.engine'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmbiformer',
    locations=['mmbiformer.engine'],
)
