"""The authors' checkpoints: their parameter names and ours; safe loading inside MMEngine.

Ours are those of an mmpretrain ``ImageClassifier``: ``backbone.…`` and ``head.fc.…``.
"""

import contextlib
import hashlib
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_distributed
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as lists
from torch import Tensor, nn

from .safe_load import CheckpointError, controls_terminal, safe_load

AUTHORS_URLS = dict(
    BiFormer='https://github.com/rayleizhu/BiFormer',
    DeBiFormer='https://github.com/maclong01/DeBiFormer',
)
# BiFormer's ImageNet-1K weights, as their page lists them.
RELEASED = {
    arch: f'https://api.onedrive.com/v1.0/shares/{share}/root/content'
    for arch, share in (
        ('tiny', 's!AkBbczdRlZvChHEOoGkgwgQzEDlM'),
        ('small', 's!AkBbczdRlZvChHDyM-x9KWRBZ832'),
        ('base', 's!AkBbczdRlZvChHI_XPhoadjaNxtO'),
        ('stl', 's!AkBbczdRlZvChSf-m7ujkvx9lIQ1'),
        ('stl_nchw', 's!AkBbczdRlZvChWYrKbWbMgqd2Ai0'),
    )
}

# The authors' names within the backbone, as a pattern and ours. STL models nest blocks once more;
# DeBiFormer's hold two of ours each, see `_split_pair`.
RENAMES = (
    (r'^(stages\.\d+)\.blocks\.', r'\1.'),
    (r'\.attn\.(?:qkv\.qkv|qkv_linear|qkv_conv\.qkv)\.', '.attn.qkv.'),
    (r'\.attn\.(?:wo|output_linear|proj_out)\.', '.attn.proj.'),
    (r'\.attn\.lepe1\.', '.attn.lepe.'),
    (r'\.attn\.conv_offset_q\.0\.', '.attn.offset.conv.'),
    (r'\.attn\.conv_offset_q\.1\.norm\.', '.attn.offset.norm.'),
    (r'\.attn\.conv_offset_q\.3\.', '.attn.offset.head.'),
    (r'\.attn\.proj_q\.', '.attn.agent_query.'),
    (r'\.attn\.proj_k\.', '.attn.agent_key.'),
    (r'\.attn\.proj_v\.', '.attn.agent_value.'),
    (r'\.attn\.unifyheads1\.', '.attn.agent_proj.'),
    (r'\.attn\.norm2\.', '.attn.agent_norm1.'),
    (r'\.attn\.norm\.', '.attn.agent_norm2.'),
    (r'\.attn\.mlp\.', '.attn.agent_mlp.'),
    (r'mlp\.(?:0|linear1\.0)\.', 'mlp.fc1.'),
    (r'mlp\.(?:[23]|linear2\.0)\.', 'mlp.fc2.'),
    (r'mlp\.dwc\.', 'mlp.conv.'),
    (r'^extra_norms\.(\d)\.(?:ln\.)?', r'norm\1.'),
)
# Numbers from a file are short: Python refuses to convert thousands of digits.
PAIR_KEY = re.compile(r'^stages\.(\d\d?)\.(\d{1,3})\.(pos_embed|norm|attn|mlp)([1-4])\.')
BLOCK_KEY = re.compile(r'^stages\.(\d\d?)\.\d{1,3}\.norm1\.weight$')
OFFICIAL_KEY = re.compile(
    r'^(?:module\.)?(?:backbone\.)?stages\.\d+\.(?:blocks\.)?\d+\.'
    r'(?:mlp\.0|mlp1\.linear1\.0)\.weight$'
)
MAP_NORM_KEY = re.compile(r'^norm\d\.')
STEM_KEY = 'downsample_layers.0.0.weight'
# What the LePE convolves shows in no name or shape: those of STL and STL-nchw are the same. So the
# backbone's version says it, which torch notes in state dicts; 1, its default, says nothing.
LEPE_VERSIONS = dict(input=2, value=3)


def is_official(checkpoint: Any) -> bool:
    """Whether a loaded file holds a model of ours under its authors' names, bare or nested."""
    state_dict = _unnest(checkpoint)
    return isinstance(state_dict, Mapping) and any(
        isinstance(key, str) and OFFICIAL_KEY.match(key) for key in state_dict
    )


def convert_official_state_dict(state_dict: Mapping[str, Any]) -> 'OrderedDict[str, Tensor]':
    """Rename the authors' parameters to ours.

    Args:
        state_dict: The authors' names and tensors: bare, or under ``model`` or ``state_dict``, with
            or without ``backbone.``; with the classification head, or dense with ``extra_norms``.

    Returns:
        OrderedDict[str, Tensor]: The same tensors under the names of an mmpretrain
        ``ImageClassifier``: ``backbone.…``, ``head.fc.…``. Dtypes are kept; 1x1 convolutions lose
        their two spatial dimensions. Other parts of a whole detector or segmentor keep their names.

    Raises:
        CheckpointError: A ValueError, if this is no model of ours under its authors' names.
    """
    if not is_official(state_dict):
        raise CheckpointError(
            _not_ours(_unnest(state_dict), f"the authors' {' or '.join(AUTHORS_URLS)} checkpoint")
        )
    state_dict = {
        key.removeprefix('module.'): value
        for key, value in _unnest(state_dict).items()
        if isinstance(value, Tensor) and isinstance(key, str)
    }
    whole_model = any(key.startswith('backbone.') for key in state_dict)
    in_pairs = any('.mlp1.' in key for key in state_dict)
    converted = OrderedDict()
    for key, value in state_dict.items():
        name = key.removeprefix('backbone.')
        if name in ('head.weight', 'head.bias'):
            converted[name.replace('head.', 'head.fc.')] = value
        elif whole_model and name == key:  # a neck or a head beside the backbone
            converted[key] = value
        else:
            if in_pairs:
                name = PAIR_KEY.sub(_split_pair, name)
            for pattern, ours in RENAMES:
                name = re.sub(pattern, ours, name)
            if value.shape[2:] == (1, 1):
                value = value.flatten(1)
            converted['backbone.' + name] = value
    if not in_pairs:
        source = 'value' if any('.attn.qkv_linear.' in key for key in state_dict) else 'input'
        converted._metadata = OrderedDict(backbone=dict(version=LEPE_VERSIONS[source]))
    return converted


def adapt_backbone_state(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    *args: Any,
) -> None:
    """Before a backbone loads: accept a whole model's names, refuse another model's weights.

    A load-state-dict pre-hook. A backbone loaded by itself takes ``backbone.…`` as its own names,
    so that ``init_cfg=dict(type='Pretrained', checkpoint=FILE)`` needs no prefix. The norms of maps
    that a dense backbone does not give are left out, and the log says so: the authors' RetinaNet
    has one for the first stage, and does not use it.

    Args:
        module: The backbone.
        state_dict: What is about to be loaded; changed in place.
        prefix: The backbone's name in the model, with a dot; '' if loaded by itself.
        local_metadata: The version of the backbone, if the checkpoint has it.
        strict: Whether all weights are wanted. MMEngine says so here, whatever its caller wants.
        *args: The rest of the hook's arguments, not needed.

    Raises:
        CheckpointError: If the weights are another model's, or another arch's.
    """
    own = module.state_dict()
    if prefix == '' and not own.keys() & state_dict.keys():
        local_metadata = getattr(state_dict, '_metadata', {}).get('backbone', {})
        for key in [key for key in state_dict if key.startswith('backbone.')]:
            state_dict[key.removeprefix('backbone.')] = state_dict.pop(key)
    given = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    if not given:
        if strict and prefix:
            print_log(
                f"nothing is loaded into the {_family(own)}: the checkpoint has no '{prefix}…'",
                logger='current',
                level=logging.WARNING,
            )
        return
    there, here = _describe(given), _describe(own)
    shapes = {name: getattr(value, 'shape', None) for name, value in given.items()}
    part = len(there) < len(here) and all(
        name in own and own[name].shape == shape for name, shape in shapes.items()
    )
    if not part:  # of a part it is only said what is missing
        if not there:
            raise CheckpointError(_not_ours(given, f'a {_family(own)} checkpoint'))
        if _family(given) != _family(own):
            raise CheckpointError(
                f'the checkpoint is of a {_family(given)}; the model has a {_family(own)}. '
                'Choose the matching model or file.'
            )
        stems = [state[STEM_KEY] for state in (given, own) if STEM_KEY in state]
        stems = [tuple(getattr(stem, 'shape', ())) for stem in stems]
        if there[: len(here)] != here or len({*stems}) > 1:
            raise CheckpointError(
                'the checkpoint is of another arch: its (blocks, channels) a stage are '
                f'{there} and its first convolution is {stems[0]}; the model has {here} and '
                f'{stems[-1]}. Choose the matching arch or file.'
            )
    # Other names are those of norms, which are new where the task is another.
    needed = {name: own[name] for name in own if name.startswith(('stages.', 'downsample_'))}
    if problems := _misfits(needed, given):
        raise CheckpointError(
            f'the weights of the {_family(own)} are damaged, or not all there: {problems}. Choose '
            'another file. (A part that is meant to be one: {**model.state_dict(), **part}.)'
        )
    sources = {version: source for source, version in LEPE_VERSIONS.items()}
    there, here = sources.get(local_metadata.get('version')), sources.get(module._version)
    if there and here and there != here:
        raise CheckpointError(
            f"the checkpoint is of an arch with lepe_source='{there}', the model has '{here}' "
            "(stl_nchw has 'value', the other archs 'input'). Choose the matching arch or file."
        )
    unused = [f'{prefix}{name}' for name in given if MAP_NORM_KEY.match(name) and name not in own]
    if unused and any(MAP_NORM_KEY.match(name) for name in own):
        names = _shown(unused, 8)
        print_log(f'left out, norms of maps that are not used: {names}', logger='current')
        for name in unused:
            del state_dict[name]


def load_whole_model(path: str) -> dict[str, Any]:
    """Load a checkpoint that must hold a whole model around a backbone of ours.

    MMEngine only logs what is missing, and would go on with random weights.

    Args:
        path: Path or URL of a checkpoint.

    Returns:
        dict[str, Any]: The checkpoint, see :func:`load_from_local`.

    Raises:
        CheckpointError: If it holds anything else.
    """
    checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    state_dict = _unnest(checkpoint)
    names = [str(name).removeprefix('module.') for name in state_dict]
    if not any(BLOCK_KEY.match(name[9:]) for name in names if name.startswith('backbone.')):
        expected = f'a model around a {" or ".join(AUTHORS_URLS)}'
        raise CheckpointError(f'{path}: {_not_ours(state_dict, expected)}')
    return checkpoint


def check_fit(
    model: nn.Module, checkpoint: Mapping[str, Any], path: str | Path, missing_too: bool = True
) -> None:
    """Raise CheckpointError unless a checkpoint holds all weights of a model, in its shapes.

    Args:
        model: The model; wrappers are looked through.
        checkpoint: A loaded checkpoint.
        path: Where it was loaded from, for the message.
        missing_too: Whether weights that are missing count. Defaults to True. (Wrappers that shard
            a model give its weights other names.)
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    given = {name.removeprefix('module.'): value for name, value in _unnest(checkpoint).items()}
    own = model.state_dict()
    if not missing_too:
        own = {name: value for name, value in own.items() if name in given}
    if problems := _misfits(own, given):
        raise CheckpointError(
            f'{path} does not fit the config: {problems}. Take the config that it was trained '
            'with, or another checkpoint of this one'
        )


def check_weights(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise CheckpointError if there are weights that no model of ours takes, whatever its config.

    Args:
        weights: Tensors by name, of a whole model.
        path: Where they were loaded from, for the message.
    """
    floating = {
        name: torch.empty(value.shape, dtype=torch.float32, device='meta')
        for name, value in weights.items()
        if value.is_floating_point() or '.stages.' in name or name.endswith(('.weight', '.bias'))
    }
    if problems := _misfits(floating, weights):
        raise CheckpointError(
            f'{path}: weights are damaged, or quantized: {problems}. Choose another file'
        )


def _misfits(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> str | None:
    """What keeps weights from being loaded as they are, for a message.

    Torch would load numbers of any kind, such as quantized ones, whose scales are elsewhere.
    """
    problems = []
    for name, value in own.items():
        if name.endswith('num_batches_tracked'):
            continue
        found = given.get(name)
        if name not in given:
            problems.append(f'{name} is missing')
        elif not isinstance(found, Tensor) or found.shape != value.shape:
            shape = tuple(getattr(found, 'shape', ()))
            problems.append(f'{name} is {shape} instead of {tuple(value.shape)}')
        elif value.is_floating_point() and not found.is_floating_point():
            problems.append(f'{name} is of {found.dtype} instead of {value.dtype}')
        elif not (found.is_meta or found.to(value.dtype).isfinite().all()):
            problems.append(f'{name} is not finite: it holds NaN or is too large')
    more = f' and {len(problems) - 3} more' if len(problems) > 3 else ''
    return ', '.join(problems[:3]) + more if problems else None


@contextlib.contextmanager
def named(path: Any) -> Iterator[None]:
    """Let errors about what a file holds begin with its name.

    Args:
        path: Path or URL of the file.
    """
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f'{path}: {error}') from error


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load a checkpoint file without running anything in it.

    The text of the config that MMEngine writes into its checkpoints is left out, as MMEngine would
    run it.

    Args:
        filename: Path of the file. The authors' released files are taken as they are.
        map_location: As in :func:`torch.load`.

    Returns:
        dict[str, Any]: The checkpoint, its weights under ``state_dict`` if they are nested; those
        of an authors' file under our names.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is no checkpoint, or holds no weights by name, or no tensors in
            a backbone of ours, or names that no terminal should be shown.
    """
    filename = os.path.expanduser(filename)
    checkpoint = safe_load(filename, map_location)
    weights = _unnest(checkpoint)
    if not isinstance(weights, Mapping) or not all(isinstance(key, str) for key in weights):
        raise CheckpointError(f'{filename} holds no weights by name: {type(weights).__name__}')
    odd = [name for name in weights if controls_terminal(name)]
    if odd:  # MMEngine prints the names of what it does not use
        raise CheckpointError(
            f'{filename} holds names with characters that terminals obey, such as '
            f'{_shown(odd)}: it is damaged, or made to deceive; download or write it again'
        )
    odd = [name for name in weights if 'stages.' in name and not isinstance(weights[name], Tensor)]
    if odd:  # of a backbone of ours nothing is left out silently
        raise CheckpointError(
            f'{filename} is damaged: weights are no tensors, such as {_shown(odd)}; download or '
            'write it again'
        )
    _drop_configs(checkpoint)
    _drop_odd_meta(checkpoint, filename)
    if is_official(checkpoint):
        print_log(f"{filename}: the authors' names, converted to ours", logger='current')
        meta = checkpoint.get('meta')
        weights = convert_official_state_dict(checkpoint)
        # MMSegmentation's init_model wants `meta`, and finds the classes there.
        return dict(meta=meta if isinstance(meta, dict) else {}, state_dict=weights)
    if weights is checkpoint.get('model'):  # where MMEngine does not look
        checkpoint['state_dict'] = checkpoint.pop('model')
    return checkpoint


def _drop_configs(checkpoint: Mapping[str, Any]) -> None:
    """Take the config's text out of a checkpoint: it is Python, and MMEngine would run it.

    Its Runner does so when it resumes, its inferencers if they are given no config.
    """
    hub = checkpoint.get('message_hub')
    runtime = hub.get('runtime_info') if isinstance(hub, dict) else None
    for part in (checkpoint.get('meta'), runtime):
        if isinstance(part, dict):
            for name in ('cfg', 'config'):
                part.pop(name, None)


def _drop_odd_meta(checkpoint: dict[str, Any], filename: str) -> None:
    """Take out what the hosts' inferencers would fail at, far from the file."""
    meta = checkpoint.get('meta', {})
    if isinstance(meta, Tensor):  # a weight of that name
        return
    if not isinstance(meta, dict):
        odd, checkpoint['meta'] = 'meta', {}
    elif not _may_name_classes(meta.get('dataset_meta', {})):
        odd = 'meta.dataset_meta'
        del meta['dataset_meta']
    elif not _may_name_classes(dict(classes=meta.get('CLASSES'))):  # of older hosts
        odd = 'meta.CLASSES'
        del meta['CLASSES']
    else:
        return
    print_log(
        f'{filename}: its {odd} does not say which classes the model has, and is left out: see to '
        'it that the names of classes are right',
        logger='current',
        level=logging.WARNING,
    )


def _may_name_classes(data: Any) -> bool:
    """Whether the hosts can read a data set's description, which need not name classes."""
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        return False
    classes = data.get('classes')
    return classes is None or hasattr(classes, '__getitem__')


def load_from_http(url: str, map_location: Any = None) -> dict[str, Any]:
    """Download a checkpoint into torch.hub's folder once, then load it as a local file.

    What proves to be no checkpoint, such as a page that says why there is none, is not kept.
    """
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    # The authors' URLs all end alike, so the name holds a digest of the whole.
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    path = os.path.join(folder, f'{digest}-{os.path.basename(url.partition("?")[0])}')
    # Before the processes know of one another each downloads; the file appears whole or not at all.
    ours = int(os.environ.get('LOCAL_RANK', 0)) == 0 or not is_distributed()
    if ours and not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path)
        except (OSError, HTTPException, ValueError) as error:  # of the network, of the address
            raise CheckpointError(
                f'{url} cannot be downloaded: {error}. Check the address, or download the file '
                'yourself and give its path'
            ) from error
    barrier()
    try:
        return load_from_local(path, map_location)
    except CheckpointError as error:
        Path(path).unlink(missing_ok=True)
        raise CheckpointError(f'{url}: {error}') from error


def load_by_name(name: str, map_location: Any = None) -> dict[str, Any]:
    """Load what MMEngine lists under a name, such as ``torchvision://resnet50``.

    Raises:
        CheckpointError: If the name is not listed.
    """
    scheme, _, key = name.partition('://')
    if scheme == 'mmcls':
        listed = lists.get_mmcls_models()
    elif scheme in ('torchvision', 'modelzoo'):
        listed = lists.get_torchvision_models()
    else:
        listed = lists.get_external_models()
        key = lists.get_deprecated_model_names().get(key, key)
    if key not in listed:
        raise CheckpointError(f'{name} is none of the models that MMEngine knows; give a file')
    path = listed[key]
    if path.startswith(('http://', 'https://')):
        checkpoint = load_from_http(path, map_location)
    else:
        checkpoint = load_from_local(os.path.join(lists._get_mmengine_home(), path), map_location)
    return lists._process_mmcls_checkpoint(checkpoint) if scheme == 'mmcls' else checkpoint


def refuse_remote(path: str, map_location: Any = None) -> None:
    """Raise CheckpointError: MMEngine would run what a file of such a store says."""
    raise CheckpointError(f'{path} cannot be read safely; download it and give the file')


def register_safe_loader() -> None:
    """Put :func:`load_from_local` in front of every path by which MMEngine loads files and URLs.

    Resume, load_from, init_cfg, test and the inferencers all go through MMEngine's
    ``CheckpointLoader``. Its own loader refuses its own checkpoints on torch >= 2.6 (the originals)
    or falls back to running what a file says (OneDL).
    """
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(
        prefixes=('http://', 'https://'), loader=load_from_http, force=True
    )
    named = ('torchvision://', 'modelzoo://', 'open-mmlab://', 'openmmlab://', 'mmcls://')
    CheckpointLoader.register_scheme(prefixes=named, loader=load_by_name, force=True)
    others = {*CheckpointLoader._schemes} - {'', 'http://', 'https://', *named}
    CheckpointLoader.register_scheme(prefixes=[*others], loader=refuse_remote, force=True)


def _unnest(checkpoint: Any) -> Any:
    for name in ('state_dict', 'model'):  # MMEngine looks for the first only
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(name), Mapping):
            return checkpoint[name]
    return checkpoint


def _split_pair(match: re.Match) -> str:
    """A layer's name in the n-th pair of blocks to that in block 2 n or 2 n + 1."""
    stage, pair, layer, number = match[1], int(match[2]), match[3], int(match[4]) - 1
    half = number
    if layer == 'norm':  # four in a pair
        half, number = divmod(number, 2)
        layer = f'norm{number + 1}'
    return f'stages.{stage}.{2 * pair + half}.{layer}.'


def _family(names: Iterable[str]) -> str:
    """Which of our backbones has parameters of these names."""
    return 'DeBiFormer' if any('.rpe_table' in name for name in names) else 'BiFormer'


def _describe(state_dict: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Blocks and channels of each stage."""
    stages: dict[int, tuple[int, int]] = {}
    for key, value in state_dict.items():
        match = BLOCK_KEY.match(key)
        if match and isinstance(value, Tensor) and value.ndim == 1:
            stage = int(match[1])
            stages[stage] = (stages.get(stage, (0, 0))[0] + 1, len(value))
    return [stages[i] for i in sorted(stages)]


def _shown(names: Iterable[Any], count: int = 3) -> str:
    """Names of a file for a message: a few, cut, and escaped, as terminals obey some characters."""
    texts = (name if isinstance(name, str) else type(name).__name__ for name in names)
    return repr(sorted(text[:80] for text in texts)[:count])


def _not_ours(found: Any, expected: str) -> str:
    if isinstance(found, Mapping):
        found = f'{len(found)} entries such as {_shown(found)}'
    else:
        found = f'a {type(found).__name__}'
    return (
        f'this is not {expected}: found {found}; expected names such as '
        f"'{STEM_KEY}' and 'stages.0.0.norm1.weight'. The authors' files: "
        + ', '.join(AUTHORS_URLS.values())
    )
