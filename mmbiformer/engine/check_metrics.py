"""Look at metrics before the first evaluation, which may be hours away."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .fake_data import SIZES

FILES = 'ann_file', 'output_dir', 'outfile_prefix'
"""Arguments of metrics that read or write, none of which is needed to make one."""


COCO_ITEMS = (
    *('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l'),
    *('AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000'),
)
"""What CocoMetric can give of boxes or masks; the first six it gives by itself."""


def check_metric(kind: Callable, node: dict[str, Any], model: nn.Module) -> set[str] | None:
    """See that a metric of a host can be computed.

    Args:
        kind: Class of the metric.
        node: Its part of the config.
        model: The whole model.

    Returns:
        set[str] | None: The names of what it gives; None if they are not known.

    Raises:
        ValueError: If the metric does not fit the model.
        Exception: What the metric itself says of its arguments.
    """
    host, of_model = (part.__module__.split('.')[0] for part in (kind, type(model)))
    if host not in SIZES:
        return None
    if host != of_model and of_model in SIZES:
        raise ValueError(
            f'{kind.__name__} is a metric of {host}, but the model gives results of {of_model}'
        )
    if kind.__name__ not in ('Accuracy', 'CocoMetric', 'IoUMetric'):
        return None  # some write when they are made
    arguments = {name: node[name] for name in node if name not in ('type', '_scope_', *FILES)}
    arguments.pop('format_only', None)  # which would need a file
    metric = kind(**arguments)
    metric.dataset_meta = dict(classes=('a',))
    names: Iterable[str]
    if kind.__name__ == 'IoUMetric':  # of one class, one pixel
        names = metric.compute_metrics([(*torch.ones(4, 1),)])
    elif kind.__name__ == 'CocoMetric':
        names = _coco_names(metric, model)
    else:
        classes = getattr(getattr(model, 'head', None), 'num_classes', None)
        scores = torch.zeros(classes if type(classes) is int else max(metric.topk))
        label = torch.zeros(1, dtype=torch.int64)
        names = metric.compute_metrics([dict(pred_score=scores, gt_label=label)])
    if node.get('format_only') or getattr(metric, 'classwise', False):
        return None
    return {f'{metric.prefix}/{name}' if metric.prefix else name for name in names}


def _coco_names(metric: Any, model: nn.Module) -> list[str]:
    if 'segm' in metric.metrics and not getattr(model, 'with_mask', True):
        raise ValueError("metric='segm' needs masks, of which the model gives none; take it out")
    for item in metric.metric_items or ():
        if item not in COCO_ITEMS:
            raise ValueError(f'metric_items has {item!r}, but there are {[*COCO_ITEMS]}')
    names = [f'AR@{number}' for number in metric.proposal_nums]
    for kind in metric.metrics:
        own = f'{kind}_' if kind in ('bbox', 'segm') else ''
        items = metric.metric_items or (COCO_ITEMS[:6] if own else COCO_ITEMS[6:])
        names += [f'{own}{item}' for item in items]
    return names
