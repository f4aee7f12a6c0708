"""Importing this makes ``mmpretrain.get_model('biformer-small_3rdparty_in1k')`` work."""

from pathlib import Path

from mmpretrain.apis import ModelHub

from .. import models  # noqa: F401  (checkpoints are read through our loader)

# Configs are inside an installed package (.mim), and beside it in the source tree.
PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE / '.mim' if (PACKAGE / '.mim' / 'configs').exists() else PACKAGE.parent

ModelHub.register_model_index(ROOT / 'configs' / 'metafile_in1k.yml', config_prefix=ROOT)
