"""Weight decay of every parameter: exempt is what the authors exempt by its name in their code."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from mmbiformer.weights.names import convert_released
from tests.helpers.configs import ROOT, load, model_of
from tests.helpers.goldens import Golden


def weight_decay(name):
    """The decay of each parameter of a config's model."""
    model, wrapper = model_of(name), load(name).optim_wrapper
    wrapper.type = 'OptimWrapper'  # MMEngine has no mixed precision without a GPU
    wrapper.pop('loss_scale', None)
    decay = {
        id(param): group['weight_decay']
        for group in build_optim_wrapper(model, wrapper).optimizer.param_groups
        for param in group['params']
    }
    return {name: decay[id(param)] for name, param in model.named_parameters()}


def authors_names(golden):
    """The authors' name and the number of dimensions of each parameter, by our name."""
    shapes = Golden(golden).shapes()
    numbered = {name: torch.tensor(float(i)) for i, name in enumerate(shapes)}
    theirs = [(name, len(shape)) for name, shape in shapes.items()]
    return {ours: theirs[int(i)] for ours, i in convert_released(numbered).items()}


def dense_names(golden, heads):
    """The authors' name of each parameter of a detector or segmentor, by our name."""
    lines = (ROOT / f'tests/data/openmmlab_0x/{heads}.txt').read_text().splitlines()
    heads = [line.split()[0] for line in lines if not line.startswith('#')]
    names = {ours: name for ours, (name, _) in authors_names(golden).items()}
    return names | {name: name for name in heads}


@pytest.mark.parametrize(
    ('name', 'golden', 'exempt', 'decay'),
    [
        ('maskrcnn_biformer_s', 'biformer_small_det', ['norm'], 0.05),
        ('upernet_biformer_s', 'biformer_small_seg', ['norm'], 0.01),
        ('maskrcnn_debiformer_s', 'debiformer_small_det', ['norm', 'rpe_table'], 0.05),
        ('retinanet_debiformer_s', 'debiformer_small_det', ['norm', 'bn'], 1e-4),
        ('upernet_debiformer_s', 'debiformer_small_seg', ['norm', 'rpe_table'], 0.01),
    ],
)
def test_exempt_by_the_authors_names(name, golden, exempt, decay):
    names = dense_names(golden, name.replace('debiformer', 'biformer'))
    found = weight_decay(f'{name}_{"ade20k" if "upernet" in name else "coco"}')
    # DeBiFormer's RetinaNet has one more map in its neck than the listed one.
    names |= {ours: ours for ours in found if ours.startswith('neck.')}
    expected = {
        ours: 0.0 if any(part in names[ours] for part in exempt) else decay for ours in found
    }
    assert found == expected
    if name.endswith('_biformer_s'):
        # norm1 and norm2 of 30 blocks, and four norms of maps, each with weight and bias.
        assert sum(value == 0 for value in found.values()) == 2 * (2 * 30 + 4)


@pytest.mark.parametrize(
    'name',
    [
        *('retinanet_biformer_s_coco', 'sfpn_biformer_s_ade20k'),
        'sfpn_debiformer_s_ade20k',
    ],
)
def test_everything_decays(name):
    assert set(weight_decay(name).values()) == {1e-4}


@pytest.mark.parametrize(
    ('name', 'golden', 'decay'),
    [
        ('biformer_s_in1k', 'biformer_small_cls', 0.05),
        ('biformer_stl_nchw_in1k', 'biformer_stl_nchw_cls', 0.05),
        ('debiformer_s_in1k', 'debiformer_small_cls', 0.1),
    ],
)
def test_vectors_and_biases_do_not_decay(name, golden, decay):
    """As in timm."""
    expected = {
        ours: 0.0 if ndim == 1 or theirs.endswith('.bias') else decay
        for ours, (theirs, ndim) in authors_names(golden).items()
        if 'running_' not in theirs and not theirs.endswith('num_batches_tracked')
    }
    assert weight_decay(name) == expected


@pytest.mark.parametrize(
    ('task', 'sizes', 'exempt'),
    [('maskrcnn', 'tsb', {'norm', 'rpe_table'}), ('retinanet', 'tsb', {'bn', 'norm'})],
)
def test_all_sizes_are_alike(task, sizes, exempt):
    for size in sizes:
        keys = load(f'{task}_debiformer_{size}_coco').optim_wrapper.paramwise_cfg.custom_keys
        assert {key for key, value in keys.items() if value.decay_mult == 0} == exempt
