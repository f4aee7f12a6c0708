"""Faults of data, disk and processes in a run: one message each, see docs/faults.md.

Everything else keeps its traceback, which a bug report needs.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..safe_load import CheckpointError
from .check_classes_hook import ClassCountError
from .check_finite_hook import NotFiniteError
from .check_lists import LabelError, check_list
from .check_pairs import MissingFileError
from .checks import (
    CommandError,
    data_paths,
    disk_problem,
    is_of_other_process,
    is_out_of_memory,
    leads_back,
    not_built,
)

RESUME = 'If there is a checkpoint, go on from it with --resume.'

PARTS = dict(
    build_dataloader='{}_dataloader',
    build_evaluator='{}_evaluator',
    build_optim_wrapper='optim_wrapper',
    build_param_scheduler='param_scheduler',
    build_val_loop='val_cfg',
    build_test_loop='test_cfg',
    build_train_loop='train_cfg',
)
"""Methods of the Runner that build parts once it runs, inner ones first, and their settings."""


@contextlib.contextmanager
def faults_explained(cfg: Config, splits: tuple[str, ...] = ('train', 'val')) -> Iterator[None]:
    """Turn faults of data, disk and processes into a CommandError.

    Args:
        cfg: The whole config, for the names of the files.
        splits: Which data loaders are used, of ``'train'``, ``'val'``, ``'test'``. Defaults to
            those of training.

    Raises:
        CommandError: In the place of a fault.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        _hear_of_no_more_deaths()
        message = _explain(error, cfg, splits)
        if message is None:
            raise
        raise CommandError(message) from error


def _explain(error: Exception, cfg: Config, splits: tuple[str, ...]) -> str | None:
    if is_out_of_memory(error):
        return None
    text = str(error)
    last_line = (text.strip().splitlines() or [''])[-1].rstrip('.')
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    files = {code.co_filename for code in codes}
    part = _part({code.co_name for code in codes})
    resume = f' {RESUME}' if 'train' in splits else ''
    if problem := disk_problem(error):
        return f'{problem}.{resume}'
    if isinstance(error, CheckpointError):
        return text
    if isinstance(error, (ClassCountError, LabelError, MissingFileError)):
        return f'{cfg.filename}: {text}'
    if isinstance(error, NotFiniteError):
        return text
    if 'resume' in {
        code.co_name for code in codes if code.co_filename.endswith('runner/runner.py')
    }:
        return (
            f'{cfg.get("load_from")} cannot be resumed from: {type(error).__name__}: {last_line}. '
            'Resume with the settings it was trained with, or start from its weights with '
            f'--cfg-options load_from={cfg.get("load_from")} in another --work-dir'
        )
    if death := _death_of_worker(error):
        return (
            f'a worker of the data loader died: {death}. If it was killed, memory ran out: '
            f'lower num_workers or batch_size of the data loader.{resume}'
        )
    if re.match(r'Caught \w+ in DataLoader worker process', text) or _within(files, 'fetch.py'):
        if '!buf.empty()' in last_line:  # all that OpenCV says
            folders = [path for path in data_paths(cfg, splits) if os.path.isdir(path)]
            return (
                f'an image file is empty; `find {" ".join(folders) or "DATA"} -type f -empty` '
                f'names it. Mend it, or take it out of the annotation file.{resume}'
            )
        if 'stack expects each tensor to be equal size' in last_line:
            return (
                f'the images of a batch differ in size: {last_line.partition("but ")[2]}. Let the '
                f'pipeline of the data loader in {cfg.filename} resize or crop them to one'
            )
        name = re.match(r'Caught (\w+)|', text)[1] or type(error).__name__
        return (
            f'an image or its annotation cannot be read: {name}: '
            f'{last_line.removeprefix(f"{name}: ")}. Mend it, or take it out of the annotation '
            f'file.{resume}'
        )
    if isinstance(error, KeyError) and '_save_best_checkpoint' in {code.co_name for code in codes}:
        return (
            f'default_hooks.checkpoint.save_best of {cfg.filename}: the evaluation gives no {text}.'
            f" Take a name from the log's line of the validation, or 'auto'.{resume}"
        )
    if isinstance(error, AssertionError) and 'before_train' in {code.co_name for code in codes}:
        return not_built(cfg, 'custom_hooks', error)  # of EMAHook, which has counted iterations
    if _is_of_config(error, part, files):
        return not_built(cfg, part or 'a part', error)
    none = 'need at least one array to concatenate' in text or text.startswith('Found 0 files')
    if none and _within(files, 'base_dataset.py'):
        paths = data_paths(cfg, _splits(part, splits))
        files = [path for path in paths if path.endswith('.json')]
        if files:
            reason = (
                'no image has an annotation of the configured classes. Let metainfo.classes name '
                'categories of the annotation file, whose image_id and category_id must be those '
                f'of its images and categories: {" and ".join(files)}'
            )
        else:
            reason = (
                f'no image was found. {_no_image(_dataset(error))}Mend the settings of the data '
                f'set, or the files in {" and ".join(paths)}'
            )
        return f'{part or "a data set"} of {cfg.filename} is empty: {reason}'
    if isinstance(error, OSError) and error.errno == errno.ELOOP and error.filename:
        return leads_back(_loop(error.filename))
    if any(re.search(r'/pycocotools/\w+\.pyx?$', file) for file in files):
        evaluated = tuple(split for split in splits if split != 'train') or splits
        paths = [path for path in data_paths(cfg, evaluated) if path.endswith('.json')]
        return (
            f'the evaluation fails: {type(error).__name__}: {last_line}. Data set and evaluator '
            'must have the same annotation file, without polygons of less than 6 numbers or '
            f'damaged masks: {" and ".join(paths)}'
        )
    if _is_of_classes(error, files):
        counts = sorted(_values(cfg.get('model'), 'num_classes'))
        return (
            f'the annotations hold more classes than the model: {last_line}. Set num_classes of '
            f'every head in {cfg.filename} (now {", ".join(map(str, counts)) or "not set"}) to '
            'the number of classes of the data'
        )
    if isinstance(error, OSError) and not str(error.filename).endswith('.json'):
        return None  # an image, say: run_command names it
    if _within(files, 'base_dataset.py') or isinstance(error, json.JSONDecodeError):
        if problem := _list_problem(_dataset(error)):
            return problem
        files = [path for path in data_paths(cfg, splits) if path.endswith('.json')]
        return (
            f'the annotations cannot be read: {type(error).__name__}: {last_line}. Look into '
            f'{" and ".join(files) or "the data set"}'
        )
    if is_of_other_process(error):
        return f'another process of this job ended: {last_line}. See its own message.{resume}'
    return None


def _dataset(error: Exception) -> Any:
    """The data set that was being built, if any."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = (frame.f_locals.get('self') for frame in frames)
    return next(reversed([owner for owner in owners if hasattr(owner, 'load_data_list')]), None)


def _list_problem(dataset: Any) -> str | None:
    """What is wrong with a list that a data set of MMPretrain found by itself."""
    host = sys.modules.get('mmpretrain.datasets')
    if host is None or not isinstance(dataset, host.CustomDataset):
        return None
    own = type(dataset).load_data_list is not host.CustomDataset.load_data_list
    if own or not dataset.with_label or not os.path.isfile(dataset.ann_file):
        return None
    problem = check_list(dataset.ann_file)
    return problem and f'{dataset.ann_file} cannot be used: {problem}'


def _no_image(dataset: Any) -> str:
    """Which files a data set looks for, and what is there instead."""
    suffixes = getattr(dataset, 'extensions', None) or getattr(dataset, 'img_suffix', None)
    prefix = getattr(dataset, 'data_prefix', None)
    folder = prefix.get('img_path') if isinstance(prefix, dict) else None
    if not suffixes or not isinstance(folder, str) or not os.path.isdir(folder):
        return ''
    names = (os.path.join(top, name) for top, _, names in os.walk(folder) for name in names)
    kinds = Counter(os.path.splitext(name)[1] for name in itertools.islice(names, 10_000))
    there = ', '.join(f'{count} of {kind or "no suffix"}' for kind, count in kinds.most_common(3))
    setting = 'extensions' if hasattr(dataset, 'extensions') else 'img_suffix'
    wanted = suffixes if isinstance(suffixes, str) else ', '.join(sorted(suffixes))
    deeper = ' in a folder for each class' if getattr(dataset, 'with_label', False) else ''
    return (
        f'Sought are files in {wanted} ({setting} of the data set){deeper}; {folder} holds '
        f'{there or "no files"}. '
    )


def _loop(path: str) -> str:
    """The first part of a path that is a link to itself, or to a folder around it."""
    for part in (*reversed(Path(path).parents), Path(path)):
        if part.is_symlink():
            target = Path(os.path.realpath(part))
            if target == part or target in Path(os.path.realpath(part.parent), 'x').parents:
                return str(part)
    return path


def _hear_of_no_more_deaths() -> None:
    """Of a worker's death PyTorch may hear twice: by its pipe and, wherever the program is by then,
    by a signal, whose handler would raise in the middle of our message.
    """
    if hasattr(signal, 'SIGCHLD') and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _death_of_worker(error: BaseException) -> str | None:
    """What PyTorch says of a worker that died. What it raises depends on where the news meets it:
    an error that names the signal, one caused by that, or one of the pipe the worker was to fill.
    """
    for said in (error.__cause__, error):
        if match := re.match(r'(DataLoader worker \(pid|Pin memory thread exited).*', str(said)):
            return match[0].rstrip('. ')
    names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    if '_try_get_data' in names and isinstance(error, (ConnectionError, EOFError)):
        return f'{type(error).__name__}: {error}'.rstrip(': ')
    return None


def _part(functions: set[str]) -> str | None:
    """Which part of the config was being built, by the names of the functions under way."""
    split = next((s for s in ('val', 'test') if f'build_{s}_loop' in functions), 'train')
    return next((part.format(split) for name, part in PARTS.items() if name in functions), None)


def _splits(part: str | None, used: tuple[str, ...]) -> tuple[str, ...]:
    """The split that a part of the config is of, or all that are used."""
    return tuple(name for name in used if not part or part.startswith(name))


def _is_of_config(error: Exception, part: str | None, files: set[str]) -> bool:
    """Whether the config is to blame, which is read piece by piece while the Runner starts."""
    text = str(error)
    if isinstance(error, KeyError) and re.search(
        r'is not in the .+ registry|must contain the key "type"', text
    ):
        return True
    # MMSegmentation looks at the names of metrics when it has seen all images.
    if isinstance(error, KeyError) and re.search(r'^.metrics .+ is not supported', text):
        return True
    # What is wrong with data that are being read is seldom in the config.
    reading = _within(files, 'base_dataset.py') or any(
        re.search(r'/coco(_api)?\.py$', file) for file in files
    )
    if part is None or reading or isinstance(error, json.JSONDecodeError):
        return False
    if isinstance(error, TypeError):
        return bool(
            re.search(
                r'unexpected keyword argument|missing \d+ required|not supported between', text
            )
        )
    return isinstance(error, (AssertionError, ImportError, ValueError))


def _is_of_classes(error: Exception, files: set[str]) -> bool:
    """Whether a label is too high for the model."""
    text = str(error)
    if re.search(r'Target \d+ is out of bounds|Class values must be smaller than num_cl', text):
        return True
    in_head = any(re.search(r'/models/(?:\w*heads|losses)/', file) for file in files)
    return in_head and bool(re.search(r'^index -?\d+ is out of bounds for dimension', text))


def _values(node: Any, name: str) -> set[Any]:
    """The values under a name, anywhere in a part of a config."""
    if isinstance(node, dict):
        found = set().union(*(_values(value, name) for value in node.values()))
        return found | {node[name]} if isinstance(node.get(name), int) else found
    if isinstance(node, (list, tuple)):
        return set().union(*(_values(value, name) for value in node))
    return set()


def _within(files: set[str], name: str) -> bool:
    """Whether an error passed through a file of torch's data loader or MMEngine's data sets."""
    return any(re.search(rf'(?:/data/_utils|mmengine/dataset)/{name}$', file) for file in files)
