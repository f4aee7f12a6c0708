"""MMEngine's loaders for local files and http(s), replaced by ours.

Resuming, ``load_from``, ``init_cfg``, testing and the inferencers all go through MMEngine's
``CheckpointLoader``. Its own loader runs what a file says where it cannot read it otherwise (OneDL)
or cannot read its own checkpoints (the originals, with torch >= 2.6). Other schemes stay its own.
"""

import hashlib
import os
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_distributed
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader

from ..errors import CheckpointError
from .names import convert_released, is_released, unnest
from .read import read_checkpoint


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Load a checkpoint file without running anything in it.

    Args:
        filename: Path of the file.
        map_location: As in :func:`torch.load`.

    Returns:
        Any: What the file holds, usually a dict; the authors' weights under our names. Weights
        under ``model`` are under ``state_dict`` too, where MMEngine looks. Configs are left out.

    Raises:
        CheckpointError: If there is no such file, or it cannot be read.
    """
    path = os.path.expanduser(filename)
    try:
        checkpoint = read_checkpoint(path, map_location)
    except OSError as error:
        raise CheckpointError(
            f'{filename} cannot be opened: {error.strerror}; check the path'
        ) from error
    if not isinstance(checkpoint, dict):
        return checkpoint
    _drop_configs(checkpoint)
    if is_released(checkpoint):
        print_log(f"{filename}: the authors' names, converted to ours", logger='current')
        meta = checkpoint.get('meta')
        # MMSegmentation's init_model wants `meta`, and finds the classes there.
        return dict(
            meta=meta if isinstance(meta, dict) else {}, state_dict=convert_released(checkpoint)
        )
    if 'state_dict' not in checkpoint and unnest(checkpoint) is not checkpoint:
        checkpoint['state_dict'] = unnest(checkpoint)
    return checkpoint


def load_from_http(url: str, map_location: Any = None) -> Any:
    """Download a checkpoint into torch.hub's folder once, then load it as a local file.

    What proves to be no checkpoint, such as a page that says why there is none, is not kept.

    Args:
        url: Where it is.
        map_location: As in :func:`torch.load`.

    Returns:
        Any: See :func:`load_from_local`.

    Raises:
        CheckpointError: If it cannot be downloaded or read.
    """
    # The authors' URLs all end alike, so the file's name holds a digest of the whole.
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    name = f'{digest}-{os.path.basename(url.partition("?")[0])}'
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    # Before the processes know of one another each downloads; the file appears whole or not at all.
    ours = int(os.environ.get('LOCAL_RANK', 0)) == 0 or not is_distributed()
    new = ours and not path.exists()
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, HTTPException, ValueError) as error:  # of the network, of the address
            raise CheckpointError(
                f'{url} cannot be downloaded: {error}. Check the address, or download the file '
                'yourself and give its path'
            ) from error
    barrier()
    try:
        return load_from_local(str(path), map_location)
    except CheckpointError as error:
        if new:
            path.unlink(missing_ok=True)
        raise CheckpointError(f'{url}: {error}') from error


def register() -> None:
    """Put the loaders above in the place of MMEngine's."""
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(
        prefixes=('http://', 'https://'), loader=load_from_http, force=True
    )


def _drop_configs(checkpoint: Mapping[str, Any]) -> None:
    """Leave out the text of configs, which is Python.

    MMEngine's runners run it when they resume, its inferencers where they are given no config.
    """
    hub = checkpoint.get('message_hub')
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    for part in (checkpoint.get('meta'), info):
        if isinstance(part, dict):
            part.pop('cfg', None)
            part.pop('config', None)
