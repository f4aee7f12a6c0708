"""Look at metrics before the first evaluation, which may be hours away."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .fake_data import SIZES

FILES = 'ann_file', 'output_dir', 'outfile_prefix'
"""Arguments of metrics that read or write, none of which is needed to make one."""


def metric_problem(kind: Callable, node: dict[str, Any], model: nn.Module) -> str | None:
    """Say why a metric of a host could not be computed; None if nothing is known.

    Args:
        kind: Class of the metric.
        node: Its part of the config.
        model: The whole model.

    Raises:
        Exception: What the metric itself says of its arguments.
    """
    host, of_model = (part.__module__.split('.')[0] for part in (kind, type(model)))
    if host not in SIZES:
        return None
    if host != of_model and of_model in SIZES:
        return f'{kind.__name__} is a metric of {host}, but the model gives results of {of_model}'
    if kind.__name__ not in ('Accuracy', 'CocoMetric', 'IoUMetric'):
        return None  # some write when they are made
    arguments = {name: node[name] for name in node if name not in ('type', '_scope_', *FILES)}
    metric = kind(**arguments)
    if kind.__name__ == 'IoUMetric':  # of one class, one pixel
        metric.total_area_to_metrics(*torch.ones(4, 1), metric.metrics)
    elif kind.__name__ == 'CocoMetric':
        if 'segm' in metric.metrics and not getattr(model, 'with_mask', True):
            return "metric='segm' needs masks, of which the model gives none; take it out"
    else:
        classes = getattr(getattr(model, 'head', None), 'num_classes', None)
        if type(classes) is int:
            metric.calculate(torch.zeros(1, classes), torch.zeros(1), metric.topk)
    return None
