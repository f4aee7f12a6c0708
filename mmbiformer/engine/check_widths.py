"""Put a small image through a model: do its parts fit together?"""

import re
import traceback
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from .fake_data import SIZES, fake_batch

SIZE = 64, 64
UNFIT = (
    r'channels|cannot be multiplied|should contain \d+ elements|normalized_shape'
    r'|must match the size of tensor b \(\d+\) at non-singleton dimension 1$'
)
"""What torch says of a map or a token that is not as wide as a layer's weights."""


def widths_problem(model: nn.Module, cfg: Config) -> str | None:
    """Say which part of a model does not take what is before it; None if nothing is known of any.

    Only what would stop every step is looked for: other faults may be those of the random image and
    its ground truth, which are not what the model is for.

    Args:
        model: The whole model, with a backbone, on the CPU; left in evaluation mode.
        cfg: The whole config.
    """
    if cfg.get('default_scope') not in SIZES:
        return None
    model.eval()  # where SyncBatchNorm speaks to no other process
    given: list[Any] = []
    handle = model.backbone.register_forward_hook(lambda *args: given.append(args[-1]))
    try:
        with torch.no_grad():
            data = model.data_preprocessor(fake_batch(cfg, 1, SIZE))
            model(**data, mode='loss')
    except Exception as error:
        # Of a failure before the backbone, or in it, the image may be the reason.
        return _explain(error, model, cfg, given[0]) if given else None
    finally:
        handle.remove()
    return None


def _explain(error: Exception, model: nn.Module, cfg: Config, maps: Any) -> str | None:
    names = {id(module): name for name, module in model.named_modules() if name}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [frame.f_locals.get('self') for frame in frames if frame.f_code.co_name == 'forward']
    parts = [names[id(owner)] for owner in owners if id(owner) in names]
    if not parts or 'loss' in parts[-1]:
        return None
    part, node = _node(cfg.model, parts[-1])
    settings = {key: node[key] for key in ('in_channels', 'in_index') if key in node}
    text = (str(error).splitlines() or [''])[0]
    unfit = isinstance(error, RuntimeError) and re.search(UNFIT, text)
    # Without an error of torch's: maps are counted, or chosen by number.
    if not unfit and not (settings and isinstance(error, (AssertionError, IndexError))):
        return None
    maps = maps if isinstance(maps, (list, tuple)) else [maps]
    widths = ', '.join(str(one.shape[1]) for one in maps if isinstance(one, torch.Tensor))
    having = ' and '.join(f'{key}={value}' for key, value in settings.items())
    return (
        f'model.{part}{f" with {having}" * bool(having)} does not fit what it is given'
        + (f': in {parts[-1]}, {text}' if unfit else '')
        + f'. The backbone gives {len(maps)} maps, of {widths} channels; a neck gives its '
        f'out_channels. Mend the numbers of model.{part}, or of what is before it'
    )


def _node(node: Any, path: str) -> tuple[str, dict]:
    """The innermost part of the config on the way to a module, and its name."""
    found: list[str] = []
    for name in path.split('.'):
        if isinstance(node, (list, tuple)) and name.isdecimal() and int(name) < len(node):
            child = node[int(name)]
        else:
            child = node.get(name) if isinstance(node, dict) else None
        if not isinstance(child, (dict, list, tuple)):
            break
        node = child
        found.append(name)
    return '.'.join(found), node if isinstance(node, dict) else {}
