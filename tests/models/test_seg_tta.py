"""Test-time augmentation that sums the views as they come."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData

pytest.importorskip('mmseg')

from mmseg.models import SegTTAModel as HostModel
from mmseg.structures import SegDataSample

from mmbiformer.models.seg_tta import SegTTAModel
from tests.helpers.configs import load

SIZE = 48, 70


@pytest.fixture
def segmentor(request):
    DefaultScope._instance_dict.clear()
    cfg = load('demo/sfpn_biformer_t_shapes').model
    cfg.backbone.arch = dict(depths=(1, 1, 1, 1), embed_dims=(64, 128, 256, 512), mlp_ratio=1)
    cfg.decode_head.update(request.param)
    torch.manual_seed(0)
    return MODELS.build(cfg).eval()


def views(images, count):
    """Some scales, each flipped and not, as the data loader gives them."""
    inputs, samples = [], []
    for i in range(count):
        height, width = (32 * (1 + i % 3), 64)
        flip = bool(i % 2)
        meta = dict(
            ori_shape=SIZE, img_shape=(height, width), pad_shape=(height, width), flip=flip,
            flip_direction='horizontal' if flip else None,
        )  # fmt: skip
        batch = [torch.nn.functional.interpolate(x[None], (height, width))[0] for x in images]
        inputs.append([x.flip(-1) if flip else x for x in batch])
        samples.append([SegDataSample(metainfo=dict(meta, img_path=f'{j}')) for j in range(2)])
        for sample in samples[-1]:
            sample.gt_sem_seg = PixelData(data=torch.zeros(1, *SIZE, dtype=torch.long))
    return dict(inputs=inputs, data_samples=samples)


@pytest.mark.parametrize(
    'segmentor', [dict(num_classes=5), dict(num_classes=2, out_channels=1)], indirect=True
)
@torch.no_grad()
def test_equals_the_hosts(segmentor):
    data = views(255 * torch.rand(2, 3, *SIZE), 6)
    ours = SegTTAModel(module=segmentor).test_step(copy.deepcopy(data))
    theirs = HostModel(module=segmentor).test_step(copy.deepcopy(data))
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        if segmentor.out_channels > 1:  # else the threshold is far from all
            assert len(b.pred_sem_seg.data.unique()) > 1
        assert a.pred_sem_seg.data.dtype == b.pred_sem_seg.data.dtype
        assert (a.pred_sem_seg.data != b.pred_sem_seg.data).sum() <= 2  # of 3360: near-ties
        assert torch.equal(a.gt_sem_seg.data, b.gt_sem_seg.data)
        assert a.img_path == b.img_path


@pytest.mark.parametrize('segmentor', [dict(num_classes=5)], indirect=True)
@torch.no_grad()
def test_logits_of_earlier_views_are_gone(segmentor):
    earlier, plain = [], segmentor.postprocess_result

    def watch(*args):
        assert not any('seg_logits' in sample for sample in earlier)
        earlier.extend(out := plain(*args))
        return out

    segmentor.postprocess_result = watch
    SegTTAModel(module=segmentor).test_step(views(255 * torch.rand(2, 3, *SIZE), 6))
    assert len(earlier) == 12
