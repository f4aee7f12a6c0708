"""The rooms of the package: what each may import, and how long a file may be."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The innermost ring first. A room may import itself and the rings before its own.
RINGS = [
    {'errors'},
    {'files', 'registry'},
    {'ops'},
    {'layers'},
    {'models'},
    {'weights', 'datasets', 'evaluation', 'visualization', 'shapes'},
    {'engine', 'export', 'hub'},
    {'commands'},
    {'tools'},
]
ROOMS = {room: set().union(*RINGS[:i], {room}) for i, ring in enumerate(RINGS) for room in ring}
ROOMS['shapes'] = {'errors', 'files', 'shapes'}
# Packages of others that a room may import, beside Python's own.
OTHERS = {
    'errors': set(),
    'files': set(),
    'ops': {'torch'},
    'layers': {'torch'},
    'shapes': {'numpy', 'cv2', 'pycocotools', 'rich', 'torch'},  # torch for its DataLoader
}
TRITON = 'mmbiformer', 'ops', 'backends', 'triton'
MOST_LINES = 500


def sources(*folders, suffixes=('.py',)):
    """Files of source code, with their paths relative to the root."""
    return [
        path.relative_to(ROOT)
        for folder in folders
        for path in sorted(ROOT.joinpath(folder).rglob('*'))
        if path.suffix in suffixes
    ]


def room_of(path):
    """``ops`` for mmbiformer/ops/regions.py, ``errors`` for mmbiformer/errors.py."""
    return 'tools' if path.parts[0] == 'tools' else path.with_suffix('').parts[1]


def imports(path):
    """Full names that a file imports, inside functions too: ``mmbiformer.ops.regions.crop``."""
    for node in ast.walk(ast.parse(ROOT.joinpath(path).read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = path.parts[: len(path.parts) - node.level] if node.level else ()
            yield from (
                '.'.join((*start, *filter(None, [node.module]), x.name)) for x in node.names
            )


@pytest.mark.parametrize('room', sorted(ROOMS))
def test_imports_point_inwards(room):
    wrong = [
        f'{path} imports {name}'
        for path in sources('mmbiformer', 'tools')
        if room_of(path) == room
        for name in imports(path)
        if name.startswith('mmbiformer.')
        if (other := name.split('.')[1]) in ROOMS and other not in ROOMS[room]
    ]
    assert not wrong


def test_every_file_is_in_a_room():
    assert {room_of(path) for path in sources('mmbiformer')} <= {*ROOMS, '__init__'}


@pytest.mark.parametrize('room', OTHERS)
def test_other_packages(room):
    known = {'mmbiformer', *sys.stdlib_module_names, *OTHERS[room]}
    wrong = [
        f'{path} imports {name}'
        for path in sources('mmbiformer')
        if room_of(path) == room
        for name in imports(path)
        if name.partition('.')[0] not in known
        if not (name.startswith('triton') and path.parts[:4] == TRITON)
    ]
    assert not wrong


def test_the_package_itself_imports_nothing():
    assert not [*imports(Path('mmbiformer/__init__.py'))]


def test_no_file_is_too_long():
    folders = 'mmbiformer', 'tools', 'tests', 'benchmarks'
    lengths = {
        path.as_posix(): len(ROOT.joinpath(path).read_text(encoding='utf-8').splitlines())
        for path in sources(*folders, suffixes=('.py', '.cpp', '.sh'))
    }
    assert not {path: n for path, n in lengths.items() if n > MOST_LINES}
