"""Child registries of MMEngine's, under the scope ``mmbiformer``.

``type='mmbiformer.BiFormer'`` builds under the default scope of any host library: MMEngine imports
this module, and from it the ``locations``, the first time it meets the prefix.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry(
    'model', parent=MMENGINE_MODELS, scope='mmbiformer', locations=['mmbiformer.models']
)
