"""DeBiFormer: its contract with the hosts, its attention, and its op against plain formulas."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from goldens import Golden
from mmengine.config import Config
from torch import nn

from mmbiformer.checkpoint import convert_official_state_dict
from mmbiformer.layers import DeformableAgentAttention
from mmbiformer.models import BiFormer, DeBiFormer
from mmbiformer.ops import agent_attention, agents
from mmbiformer.registry import MODELS
from mmbiformer.safe_load import CheckpointError

CONFIGS = Path(__file__).parents[1] / 'configs'
TOY = dict(
    depths=(1, 1, 2, 1),
    embed_dims=(32, 64, 96, 128),
    mlp_ratios=(2, 2, 2, 1),
    agent_mlp_ratios=(1, 1, 1, 2),
    topks=(1, 2, 4, None),
    agent_topks=(1, 2, 4, 3),
    groups=(1, 2, 3, 2),
    table_sizes=(8, 4, 3, 2),
)


def toy(**kwargs):
    return DeBiFormer(**{**dict(arch=TOY, region_grid=2), **kwargs})


def layer(**kwargs):
    defaults = dict(
        num_heads=4, topk=3, num_groups=2, stride=2, offset_kernel=3, table_size=5, region_grid=3
    )
    return DeformableAgentAttention(32, **{**defaults, **kwargs}).double()


# The op


def operands(size=(7, 9), num_agents=6, groups=2, heads=4, batch=2, dtype=torch.float64):
    q = torch.randn(batch, *size, 32, dtype=dtype)
    k, v = torch.randn(2, batch, num_agents, 32, dtype=dtype)
    positions = torch.rand(batch, groups, num_agents, 2, dtype=dtype) * 2 - 1
    positions[:, :, 0], positions[:, :, 1, 0] = 1, -1  # on the border
    table = torch.randn(heads, 7, 5, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, positions, table)]


def attend(q, k, v, positions, table):
    rows, columns = (torch.linspace(-1, 1, n, dtype=positions.dtype) for n in q.shape[1:3])
    return agent_attention(q, k, v, positions, table, rows=rows, columns=columns, scale=0.3)


def attend_plainly(q, k, v, positions, table):
    """The whole bias at once, by ``grid_sample``."""
    (batch, *size, dim), (heads, *table_size), groups = q.shape, table.shape, positions.shape[1]
    tokens = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=q.dtype) for n in size), indexing='ij')
    tokens = torch.stack(tokens, -1).flatten(0, 1)[:, None]
    grid = ((tokens - positions[:, :, None]) / 2).flip(-1).flatten(0, 1)
    tables = table.expand(batch, -1, -1, -1).reshape(-1, heads // groups, *table_size)
    bias = (
        F.grid_sample(tables, grid, align_corners=True).unflatten(0, (batch, groups)).flatten(1, 2)
    )
    q, k, v = (x.flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = (0.3 * q @ k.mT + bias).softmax(-1) @ v
    return out.transpose(1, 2).reshape(batch, *size, dim)


@pytest.mark.parametrize('limit', [1, 500, 2**20])
def test_agent_attention(limit, monkeypatch):
    """Output and every gradient, whether row by row or at once."""
    monkeypatch.setattr(agents, 'LOGITS_ON_CPU', limit)
    inputs = operands()
    cotangent = torch.randn(2, 7, 9, 32, dtype=torch.float64)
    found, expected = attend(*inputs), attend_plainly(*inputs)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(attend(*inputs), expected)
    *grads, position, table = torch.autograd.grad(found, inputs, cotangent)
    *expected_grads, expected_position, expected_table = torch.autograd.grad(
        expected, inputs, cotangent
    )
    torch.testing.assert_close([*grads, table], [*expected_grads, expected_table])
    # On the border grid_sample differentiates towards a neighbour outside, which is 0.
    torch.testing.assert_close(position[:, :, 2:], expected_position[:, :, 2:])


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (6, 1)])
def test_agent_attention_of_thin_maps(size):
    out = attend(*operands(size))
    assert out.shape == (2, *size, 32)
    assert out.isfinite().all()


def test_agent_attention_never_holds_the_whole_bias(monkeypatch):
    monkeypatch.setattr(agents, 'LOGITS_ON_CPU', 2 * 4 * 6 * 9)
    most = 0

    def watch(*args):
        nonlocal most
        out = einsum(*args)
        most = max(most, out.numel())
        return out

    einsum = torch.einsum
    monkeypatch.setattr(torch, 'einsum', watch)
    attend(*operands())
    assert most <= 2 * 4 * 6 * 9  # one row of seven


def test_not_a_number_is_no_index():
    """fp16 training overflows now and then; on CUDA a wrong index would end the process."""
    q, k, v, positions, table = operands()
    with torch.no_grad():
        positions[0, 0, 0] = torch.nan
    out = attend(q, k, v, positions, table)
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (dict(table=torch.zeros(4, 1, 5)), r'2 or more.*got \(4, 1, 5\)'),
        (dict(table=torch.zeros(5, 5, 5)), '32 channels a multiple of the heads'),
        (dict(table=torch.zeros(1, 5, 5)), 'of 2 groups'),
        (dict(table=torch.zeros(5, 5)), r'got \(5, 5\)'),
        (dict(positions=torch.zeros(2, 2, 6, 2).half()), 'in float64; got torch.float16'),
    ],
)
def test_agent_attention_arguments(wrong, message):
    names = 'query', 'key', 'value', 'positions', 'table'
    given = {**dict(zip(names, operands(), strict=True)), **wrong}
    with pytest.raises(ValueError, match=message):
        attend(*(given[name] for name in names))


# The layer


def test_agents_are_queries_of_the_one_routed_attention(monkeypatch):
    """Their regions are not the keys'."""
    calls = []

    def spy(q, k, v, routes, **kwargs):
        calls.append((q.shape[1:3], k.shape[1:3], kwargs['region_size'], kwargs['key_region_size']))
        return routed_attention(q, k, v, routes, **kwargs)

    module = __import__('mmbiformer.layers.deformable_agent', fromlist=['_'])
    routed_attention = module.routed_attention
    monkeypatch.setattr(module, 'routed_attention', spy)
    layer()(torch.randn(1, 10, 14, 32, dtype=torch.float64))
    assert calls == [((6, 9), (12, 15), (2, 3), (4, 5))]


@pytest.mark.parametrize('size', [(12, 18), (6, 6)])
def test_policies_agree_where_nothing_is_padded(size):
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    released, masked = layer(), layer(padding='mask')
    masked.load_state_dict(released.state_dict())
    torch.testing.assert_close(masked(x), released(x))


def test_mask_sees_no_padding():
    """Where one region is the whole map, a larger grid's padding must not matter."""
    x = torch.randn(2, 7, 5, 32, dtype=torch.float64)
    whole = layer(region_grid=1, topk=1)
    for padding, same in (('mask', True), ('input', False)):
        gridded = layer(region_grid=3, topk=9, padding=padding)
        gridded.load_state_dict(whole.state_dict())
        assert torch.allclose(gridded(x), whole(x)) == same


def test_one_offset_moves_agents_down_and_right():
    attention = layer(table_size=4)
    q = torch.zeros(1, 6, 6, 32, dtype=torch.float64)
    still = attention._positions(q)  # zero queries, zero offset
    moved = still.clone()
    nn.init.constant_(attention.offset.head.weight, 1.0)
    nn.init.constant_(attention.offset.norm.bias, 0.1)
    moved = attention._positions(q)
    assert still[0, 0, 0].tolist() == pytest.approx([1 / 3 - 1] * 4)
    step = 16 * F.gelu(torch.tensor(0.1)).item()
    assert moved[0, 0, 0].tolist() == pytest.approx([min(1 / 3 - 1 + step, 1)] * 4, rel=1e-6)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(num_heads=3), 'dim=32 must be a multiple of num_heads=3'),
        (dict(num_groups=3), 'num_groups=3'),
        (dict(offset_kernel=4), 'offset_kernel=4 must be an odd number'),
        (dict(stride=0), 'stride=0 must be positive'),
        (dict(table_size=1), 'table_size=1 2 or more'),
        (dict(padding='projected'), r"padding='projected' is unknown; choose one of \['input'"),
        (dict(topk=10), 'topk=10 does not fit the 9 regions'),
    ],
)
def test_layer_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        layer(**kwargs)


# The backbone


@pytest.mark.parametrize(
    ('arch', 'params', 'blocks'),
    [
        ('tiny', 21_495_598, (2, 2, 8, 2)),
        ('small', 44_008_028, (4, 4, 18, 6)),
        ('base', 95_501_926, (4, 4, 18, 4)),
        (
            dict(depths=(2, 2, 9, 1), embed_dims=(96, 192, 384, 768), groups=(1, 2, 3, 6)),
            71.7e6,
            None,
        ),
    ],
)
def test_archs(arch, params, blocks):
    """Parameters with a classifier; the last is the unused function of the authors' file."""
    with torch.device('meta'):
        net = MODELS.build(dict(type='DeBiFormer', arch=arch, final_norm=True))
    found = sum(p.numel() for p in net.parameters()) + (net.norm.num_features + 1) * 1000
    assert found == params if blocks else found == pytest.approx(params, rel=1e-3)
    assert blocks in (None, tuple(len(stage) for stage in net.stages))


@pytest.mark.parametrize(
    'kwargs', [dict(), dict(out_indices=(1, 2), with_cp=True), dict(final_norm=True)]
)
def test_nothing_goes_unused(kwargs):
    net = toy(**kwargs)
    sum(out.square().sum() for out in net(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert len(net.stages) == (3 if 'out_indices' in kwargs else 4)


@pytest.mark.parametrize(
    ('size', 'padding'),
    [
        ((65, 97), 'input'),
        ((65, 97), 'mask'),
        ((33, 7), 'input'),
        ((33, 7), 'mask'),
        ((1, 1), 'input'),
    ],
)
def test_any_size(size, padding):
    outs = toy(padding=padding).eval()(torch.randn(1, 3, *size))
    for out, stride in zip(outs, (4, 8, 16, 32), strict=True):
        assert out.shape[2:] == tuple(-(-n // stride) for n in size)
        assert out.is_contiguous()
        assert out.isfinite().all()


def test_no_images():
    assert [len(out) for out in toy().eval()(torch.randn(0, 3, 64, 64))] == [0] * 4


@torch.no_grad()  # PyTorch 2.4 has no checkpoint there
def test_meta_device():
    """Shapes alone, as tools ask for them."""
    outs = toy().to('meta')(torch.empty(2, 3, 64, 96, device='meta'))
    assert [tuple(out.shape[2:]) for out in outs] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_checkpointing_changes_nothing():
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        net = toy(with_cp=with_cp)
        net(x)[3].square().sum().backward()
        grads.append([p.grad for name, p in net.named_parameters() if 'norm0' not in name])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast():
    """bfloat16 follows float32; positions, and the bias they read, stay in float32."""
    net = toy(region_grid=1, arch=dict(TOY, topks=(1, 1, 1, None), agent_topks=(1, 1, 1, 1)))
    x = torch.randn(2, 3, 64, 96)
    expected = [out.detach() for out in net(x)]
    with torch.autocast('cpu', torch.bfloat16):
        found = net(x)
    sum(out.float().square().sum() for out in found).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 0.05 * b.abs().max()


def test_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        x, grads = torch.randn(2, 3, 64, 64), []
        for _ in range(2):
            torch.manual_seed(0)
            net = toy()
            sum(out.square().sum() for out in net(x)).backward()
            grads.append([p.grad for p in net.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiles_to_one_graph():
    """Forwards and backwards, at a size that is padded."""
    two = dict(depths=(1, 1), strides=(8, 4), offset_kernels=(9, 7))
    arch = {key: value[:2] for key, value in TOY.items()} | two
    net = toy(arch=arch).train()
    torch.compiler.reset()  # sizes seen in other tests would be symbols here, for minutes
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    x = torch.randn(1, 3, 36, 44)
    found, expected = compiled(x), net(x)
    params = list(net.parameters())
    grads = [
        torch.autograd.grad(sum(out.square().sum() for out in outs), params)
        for outs in (found, expected)
    ]
    for a, b in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_freezing_and_layer_depth():
    net = toy(frozen_stages=2, norm_eval=True).train()
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert 'stages.1.1.attn.rpe_table' in frozen
    assert 'stages.2.1.attn.rpe_table' not in frozen
    assert net.get_layer_depth('backbone.stages.1.1.attn.rpe_table', 'backbone.') == (4, 12)
    rates = [b.drop_path.drop_prob for s in toy(drop_path_rate=0.4).stages for b in s]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='stl'), "arch='stl' is unknown; choose one of .*'small'"),
        (dict(arch=dict(depths=(1,))), "needs .*'embed_dims'.* got .*'depths'"),
        (dict(arch=dict(TOY, groups=(1, 2))), 'groups.* must have one entry a stage'),
        (dict(region_grid=1), 'topk=2 does not fit the 1 regions'),
        (dict(padding='projected'), "padding='projected' is unknown"),
        (dict(arch='tiny', region_grid=6), 'topk=49 does not fit the 36 regions'),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        toy(**kwargs)


# The authors' files


@pytest.fixture
def released(tmp_path):
    state_dict = {
        name: value.float() if value.is_floating_point() else value
        for name, value in Golden('debiformer_tiny_cls').official_state_dict().items()
    }
    torch.save(dict(model=state_dict, epoch=299), tmp_path / 'debi_tiny.pth')
    return tmp_path / 'debi_tiny.pth', state_dict


def test_released_file_as_init_cfg(released):
    path, state_dict = released
    net = DeBiFormer(
        'tiny', final_norm=True, init_cfg=dict(type='Pretrained', checkpoint=str(path))
    )
    net.init_weights()
    expected = convert_official_state_dict(state_dict)
    assert len(expected) == len(net.state_dict()) + 2
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[f'backbone.{name}']), name


def test_weight_decay_by_the_authors_names():
    """What they exempt by `norm` is called `norm` here too, and the rest is not."""
    names = Golden('debiformer_tiny_cls').official_state_dict()
    numbered = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    theirs = list(names)
    for ours, i in convert_official_state_dict(numbered).items():
        assert ('norm' in ours) == ('norm' in theirs[int(i)]), ours


@pytest.mark.parametrize(
    ('net', 'golden', 'message'),
    [
        (lambda: BiFormer('tiny'), 'debiformer_tiny_cls', 'is of a DeBiFormer; the model has a Bi'),
        (lambda: DeBiFormer('tiny'), 'biformer_tiny_cls', 'is of a BiFormer; the model has a DeBi'),
        (lambda: DeBiFormer('small'), 'debiformer_tiny_cls', 'is of another arch'),
    ],
)
def test_another_model_is_refused(net, golden, message):
    converted = convert_official_state_dict(Golden(golden).official_state_dict())
    with torch.device('meta'):
        net = net()
    with pytest.raises(CheckpointError, match=message):
        net.load_state_dict(converted, strict=False)


# The recipes

# arch, grid, drop path | GPUs, images each | lr, decay | warm-up steps, length of the schedule
RECIPES = {
    'debiformer_t_in1k': ('tiny', 7, 0.0, 8, 256, 2e-3, 0.1, 20, 300),
    'debiformer_s_in1k': ('small', 7, 0.3, 8, 256, 2e-3, 0.1, 20, 300),
    'debiformer_b_in1k': ('base', 7, 0.4, 8, 256, 2e-3, 0.1, 20, 300),
    'maskrcnn_debiformer_t_coco': ('tiny', 8, 0.1, 8, 2, 1e-4, 0.05, 500, 12),
    'maskrcnn_debiformer_s_coco': ('small', 16, 0.2, 8, 1, 5e-5, 0.05, 1500, 12),
    'maskrcnn_debiformer_b_coco': ('base', 32, 0.3, 4, 2, 2.5e-5, 0.05, 5000, 12),
    'retinanet_debiformer_t_coco': ('tiny', 8, 0.1, 8, 2, 1e-4, 1e-4, 500, 12),
    'retinanet_debiformer_s_coco': ('small', 16, 0.0, 8, 2, 1e-4, 1e-4, 500, 12),
    'retinanet_debiformer_b_coco': ('base', 32, 0.0, 8, 2, 1e-4, 1e-4, 500, 12),
    'sfpn_debiformer_s_ade20k': ('small', 8, 0.15, 4, 2, 5e-5, 1e-4, 9000, 320_000),
    'sfpn_debiformer_b_ade20k': ('base', 8, 0.4, 4, 2, 1e-4, 1e-4, 3000, 160_000),
    'upernet_debiformer_s_ade20k': ('small', 8, 0.3, 8, 2, 6e-5, 0.01, 3000, 160_000),
    'upernet_debiformer_b_ade20k': ('base', 8, 0.4, 8, 2, 6e-5, 0.01, 3000, 160_000),
}


@pytest.mark.parametrize('name', RECIPES)
def test_recipe(name):
    pytest.importorskip('mmpretrain')
    arch, grid, drop_path, gpus, images, lr, decay, warmup, length = RECIPES[name]
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    backbone = cfg.model.backbone
    assert backbone.type == 'mmbiformer.DeBiFormer'
    assert (backbone.arch, backbone.region_grid, backbone.drop_path_rate) == (arch, grid, drop_path)
    assert not backbone.get('norm_eval')
    assert cfg.get('sync_bn') is None
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr.base_batch_size == gpus * images
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', lr, decay)
    first = cfg.param_scheduler[0]
    assert first.get('warmup_epochs', first.get('end', 0) - 1) == warmup
    assert cfg.train_cfg.get('max_epochs', cfg.train_cfg.get('max_iters')) == length
    if name.endswith('in1k'):
        assert cfg.optim_wrapper.clip_grad.max_norm == 5
        assert cfg.train_dataloader.sampler.type == 'DefaultSampler'
        assert not cfg.custom_hooks
    if name.endswith('ade20k'):
        steps = [step.type for step in cfg.test_dataloader.dataset.pipeline]
        assert steps[1:3] == ['Resize', 'ResizeToMultiple']
        assert [dict(type='ResizeToMultiple', size_divisor=32)] in cfg.tta_pipeline[1].transforms


@pytest.mark.parametrize(
    ('name', 'exempt'),
    [('maskrcnn', {'norm', 'rpe_table'}), ('retinanet', {'bn', 'norm'})],
)
def test_what_does_not_decay(name, exempt):
    pytest.importorskip('mmpretrain')
    for size in 'tsb':
        cfg = Config.fromfile(CONFIGS / f'{name}_debiformer_{size}_coco.py')
        keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
        assert {key for key, value in keys.items() if value.decay_mult == 0} == exempt
