"""Importing this makes ``mmpretrain.get_model('biformer-small_3rdparty_in1k')`` work."""

from pathlib import Path

from mmpretrain.apis import ModelHub

from .. import models  # noqa: F401  (checkpoints are read through our loader)

PACKAGE = Path(__file__).parents[1]
# Configs are inside an installed package, and beside it in the source tree.
ROOT = next(
    folder for folder in (PACKAGE / '.mim', PACKAGE.parent) if (folder / 'configs').exists()
)

ModelHub.register_model_index(ROOT / 'configs' / 'metafile_in1k.yml', config_prefix=ROOT)
