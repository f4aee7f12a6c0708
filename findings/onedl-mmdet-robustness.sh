#!/usr/bin/env bash
# OneDL's MMDetection: its robustness test asks for a transform that it no longer has.
#
# Version:  onedl-mmdetection 3.5.1 (mmdet 3.3.0 has both).
# Expected: tools/analysis_tools/test_robustness.py, which the wheel ships, runs.
# Seen:     it inserts dict(type='Corrupt', ...) into the test pipeline, and no file of the package
#           defines or registers a transform of this name; what is left is the import of
#           imagecorruptions, unused.
#
# Output:
#   test_robustness.py asks for type='Corrupt'
#   transforms of this name: 0; unused imports of imagecorruptions: 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
python=$folder/env/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if command -v uv >/dev/null; then install() { uv pip install --quiet --python "$python" "$@"; }; fi
install --no-deps 'onedl-mmdetection==3.5.1'  # nothing of it is imported

"$python" - "$folder" <<'PYTHON'
import re
import sys
from pathlib import Path

(package,) = Path(sys.argv[1], 'env').glob('lib/python3*/site-packages/mmdet')
tool = (package / '.mim/tools/analysis_tools/test_robustness.py').read_text()
asked = "type='Corrupt'" in tool
print("test_robustness.py asks for type='Corrupt'" if asked else 'it asks no longer')
texts = [path.read_text() for path in package.rglob('*.py') if '.mim' not in path.parts]
defined = sum(len(re.findall(r'class Corrupt\b|name=.Corrupt\b', text)) for text in texts)
imports = sum('from imagecorruptions import corrupt' in text for text in texts)
print(f'transforms of this name: {defined}; unused imports of imagecorruptions: {imports}')
sys.exit(0 if (asked, defined, imports) == (True, 0, 1) else 'This has changed.')
PYTHON
