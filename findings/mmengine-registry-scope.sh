#!/usr/bin/env bash
# MMEngine: a registry builds another registry's class.
#
# Version:  onedl-mmengine 0.10.12 (and mmengine 0.10.7), torch 2.11.0.
# Expected: plugin.MODELS.build(dict(type='Head')) builds the Head that was registered in
#           plugin.MODELS, as plugin.MODELS.get('Head') returns it.
# Seen:     build first goes to the registry of the default scope, which is global and set by
#           whichever config runs. There a class of the same name is built in its place, silently,
#           and a name that only the plugin has is a KeyError. So a package cannot use its own
#           registry to build its own parts: it must write 'plugin.Head', or the class itself.
#
# Output, with the default scope 'host':
#   plugin.MODELS.get('Head')                 plugin.Head
#   plugin.MODELS.build(type='Head')          host.Head
#   plugin.MODELS.build(type='plugin.Head')   plugin.Head
#   plugin.MODELS.build(type='Part')          KeyError: 'Part is not in the host::model registry.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
python=$folder/env/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if command -v uv >/dev/null; then install() { uv pip install --quiet --python "$python" "$@"; }; fi
install 'torch==2.11.0' 'numpy==2.2.6' 'onedl-mmengine==0.10.12'
for package in plugin host; do  # two packages as MMEngine's documentation describes them
  mkdir "$folder/$package"
  cat >"$folder/$package/registry.py" <<MODULE
from mmengine.registry import MODELS as ROOT, Registry
MODELS = Registry('model', parent=ROOT, scope='$package')
@MODELS.register_module()
class Head:
    name = '$package.Head'
MODULE
done

"$python" - "$folder" <<'PYTHON'
import sys

sys.path.insert(0, sys.argv[1])
import host.registry
from mmengine.registry import DefaultScope
from plugin.registry import MODELS


@MODELS.register_module()
class Part:
    name = 'plugin.Part'


def build(name):
    try:
        return MODELS.build(dict(type=name)).name
    except KeyError as error:
        return f'KeyError: {error}'.split(' Please')[0]


DefaultScope.get_instance('run', scope_name='host')  # as a Runner does with default_scope='host'
found = [MODELS.get('Head').name, *map(build, ('Head', 'plugin.Head', 'Part'))]
calls = [
    "plugin.MODELS.get('Head')",
    *(f"plugin.MODELS.build(type='{name}')" for name in ('Head', 'plugin.Head', 'Part')),
]
for call, result in zip(calls, found):
    print(f'{call:41} {result}')
as_described = found[:3] == ['plugin.Head', 'host.Head', 'plugin.Head'] and 'KeyError' in found[3]
sys.exit(0 if as_described else 'This has changed.')
PYTHON
