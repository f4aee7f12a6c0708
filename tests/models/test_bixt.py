"""BiXT: latents and tokens, whatever comes out; see test_goldens.py for the numbers."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.modules.batchnorm import _BatchNorm

from mmbiformer.commands.complexity import count_macs
from mmbiformer.layers import inplace
from mmbiformer.models import BiXT, bixt
from mmbiformer.ops import BIDIRECTIONAL_BACKENDS
from tests.helpers.attention import assert_close
from tests.helpers.backbones import ARCHS, toy

OUT_TYPES = [
    dict(out_type='avg_latents'),
    dict(out_type='latents'),
    dict(out_type='featmap'),
    dict(out_type='featmap', out_indices=(0, 1)),
]
out_types = pytest.mark.parametrize('out', OUT_TYPES, ids=lambda x: '-'.join(map(str, x.values())))
tokenizers = pytest.mark.parametrize('tokenizer', ['patch', 'conv'])


def net_of(tokenizer='patch', stride=8, seed=0, **kwargs):
    """Seeds, so that two of them have the same weights; with latents and biases that matter."""
    torch.manual_seed(seed)
    net = toy(BiXT, arch=dict(ARCHS[BiXT], tokenizer=tokenizer, stride=stride), **kwargs)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def gradients(net, images):
    outs = net(images)
    sum(out.float().sin().sum() for out in outs).backward()
    return [*outs, *(p.grad for p in net.parameters())]


# Parameters with a classifier of 1000
# classes; multiply-adds at 224x224, as fvcore counts them.
@pytest.mark.parametrize(
    ('arch', 'latents', 'dim', 'depth', 'stride', 'params', 'macs'),
    [
        ('ti_l64_p16', 64, 192, 12, 16, 15_121_192, 1_679_473_344),
        ('ti_l64_p16s8', 64, 192, 12, 8, 15_121_192, 4_705_424_832),
        ('ti_l64_p16s4', 64, 192, 12, 4, 15_121_192, 16_809_230_784),
        ('ti_l32_p16', 32, 192, 12, 16, 15_121_192 - 32 * 192, None),
        ('ti_l32_p16s8', 32, 192, 12, 8, 15_121_192 - 32 * 192, None),
        ('ti_l128_p16', 128, 192, 12, 16, 15_121_192 + 64 * 192, None),
        ('ti_l128_p16s8', 128, 192, 12, 8, 15_121_192 + 64 * 192, None),
        ('ti_l64_d13_p16', 64, 192, 13, 16, 16_381_672, None),
        ('ti_l64_d13_p16s8', 64, 192, 13, 8, 16_381_672, None),
        ('ti_l64_d13_p16s4', 64, 192, 13, 4, 16_381_672, None),
        ('ed256_l64_p16', 64, 256, 12, 16, 26_682_088, 2_922_641_664),
        ('ed256_l64_p16s8', 64, 256, 12, 8, 26_682_088, None),
        ('ed256LS_l64_p16s8', 64, 256, 12, 8, 26_700_008, 8_142_200_064),
        ('ti_cnv_l64_p16', 64, 192, 12, 16, None, None),
        ('ti_cnv_l64_d13_p16', 64, 192, 13, 16, 16_453_120, None),
        ('ti_cnv_l64_d13_p8', 64, 192, 13, 8, 16_443_352, None),
        ('ti_cnv_l64_d13_p4', 64, 192, 13, 4, None, None),
    ],
)
def test_archs(arch, latents, dim, depth, stride, params, macs):
    images = torch.empty(1, 3, 224, 224, device='meta')
    with torch.device('meta'):
        net = BiXT(arch)
    assert [*BiXT.archs].count(arch) == 1 and len(BiXT.archs) == 17
    assert net.latents.shape == (1, latents, dim)
    assert len(net.blocks) == depth
    assert net.blocks[0].cross.attn.num_heads == net.blocks[0].refine.attn.num_heads == dim // 32
    assert net.tokenizer(images).shape == (1, 224 // stride, 224 // stride, dim)
    if params:
        assert sum(p.numel() for p in net.parameters()) + 1000 * (dim + 1) == params
    if macs:
        # fvcore counts 5 a normalised number; the authors project each place of the table anew.
        side = 224 // stride
        normalised = (4 * latents * depth + side * side * (2 * depth - 1) + 1) * dim
        places = 32 * dim * (2 * side * side - 2 * side)
        assert count_macs(net, images)['total'] + 1000 * dim + 5 * normalised + places == macs


@tokenizers
@pytest.mark.parametrize('stride', [4, 8, 16])
@torch.no_grad()
def test_outputs(tokenizer, stride):
    """Maps of images of any size are rounded up, contiguous, and the tokens after a block."""
    kwargs = dict(tokenizer=tokenizer, stride=stride)
    net = net_of(out_type='featmap', out_indices=(0, -1), **kwargs).eval()
    assert net.out_indices == (0, 2)
    for size in ((32, 48), (33, 1), (7, 40)):
        images = torch.randn(2, 3, *size)
        maps = net(images)
        sides = [-(-n // stride) for n in size]
        assert [tuple(each.shape) for each in maps] == [(2, 64, *sides)] * 2
        assert all(each.is_contiguous() for each in maps)
        assert_close(net(images.to(memory_format=torch.channels_last)), maps, 1e-5)
    first = net_of(out_type='featmap', out_indices=0, **kwargs).eval()
    first.load_state_dict(net.state_dict(), strict=False)
    torch.testing.assert_close(first(images)[0], maps[0])
    latents = net_of(out_type='latents', **kwargs).eval()
    pooled = net_of(**kwargs).eval()
    pooled.load_state_dict(latents.state_dict(), strict=False)
    assert latents(images)[0].shape == (2, 5, 64)
    torch.testing.assert_close(pooled(images)[0], pooled.norm(latents(images)[0].mean(1)))
    assert latents(images[:0])[0].shape == (0, 5, 64)
    assert pooled.norm.eps == pooled.blocks[1].cross.norm1_tokens.eps == 1e-6


@out_types
def test_every_parameter_learns(out):
    """So that DistributedDataParallel needs no ``find_unused_parameters``."""
    net = net_of(**out)
    gradients(net, torch.randn(2, 3, 32, 40))
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert len(net.blocks) == (4 if out['out_type'] != 'featmap' else net.out_indices[-1] + 1)


@out_types
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_training_step_equals_the_references(out, dtype, tolerance):
    images = torch.randn(3, 3, 24, 40, dtype=dtype)
    nets = [net_of(layer, **out) for layer in ('conv', 'conv')]
    for module in nets[1].modules():
        if hasattr(module, 'backend'):
            module.backend = 'reference'
    found, expected = (gradients(net.to(dtype), images) for net in nets)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + tolerance * b.numel() ** 0.5 / 100


@pytest.mark.parametrize('backend', BIDIRECTIONAL_BACKENDS)
def test_backend(backend):
    net = toy(BiXT, backend=backend, out_type='featmap')
    both = [m.backend for m in net.modules() if hasattr(m, 'backend')]
    assert both == [backend] * 3


@out_types
@pytest.mark.parametrize('frozen', [-1, 0, 2])
def test_frozen_stages(out, frozen):
    net = net_of('conv', frozen_stages=frozen, **out)
    for _ in range(2):
        for depth, part in enumerate([net.tokenizer, *net.blocks]):
            assert part.training == (depth > frozen)
            assert all(p.requires_grad == (depth > frozen) for p in part.parameters())
        assert net.latents.requires_grad == (frozen < 0)
        assert net.train() is net
    outs = net(torch.randn(2, 3, 24, 24))
    if frozen < len(net.blocks):
        sum(each.sum() for each in outs).backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


@pytest.mark.parametrize('norm_eval', [False, True])
def test_norm_eval(norm_eval):
    net = net_of('conv', norm_eval=norm_eval).train()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    assert [norm.training for norm in norms] == [not norm_eval] * 3
    assert net.blocks[0].training


@out_types
def test_checkpointing_changes_nothing(out, monkeypatch):
    images, recomputed, plain = torch.randn(2, 3, 32, 32), [], bixt.checkpoint

    def note(block, *args, **kwargs):
        recomputed.append(block)
        return plain(block, *args, **kwargs)

    monkeypatch.setattr(bixt, 'checkpoint', note)
    found = []
    for with_cp in (False, True):
        net = net_of(with_cp=with_cp, drop_path_rate=0.5, **out)
        torch.manual_seed(1)
        found.append(gradients(net, images))
    assert all(map(torch.equal, *found))
    assert recomputed == [*net.blocks]


@pytest.mark.parametrize(('rate', 'cross', 'refine'), [(0.3, 0.3, 0.3), ([0.0, 0.6], 0, 0.6)])
def test_drop_path_rises_linearly(rate, cross, refine):
    """Over all blocks, those that are not built included."""
    for out in OUT_TYPES:
        net = net_of(drop_path_rate=rate, **out)
        for i, block in enumerate(net.blocks):
            assert block.cross.drop_path.drop_prob == pytest.approx(cross * i / 3)
            if block.refine is not None:
                assert block.refine.drop_path.drop_prob == pytest.approx(refine * i / 3)
        images = torch.randn(8, 3, 16, 16)
        if out['out_type'] == 'latents':
            assert not torch.equal(net(images)[0], net(images)[0])
        net.eval()
        assert torch.equal(net(images)[0], net(images)[0])


def test_drop_path_drops_each_branch_by_itself():
    """For an image a branch is kept or not: latents and tokens draw their own."""
    torch.manual_seed(0)
    block = bixt.CrossBlock(32, True, True, None, 0.5, 'auto').train()
    latents, tokens = torch.randn(200, 1, 32), torch.randn(200, 1, 1, 32)
    kept = [
        (after.flatten(1) != before.flatten(1)).any(1)
        for before, after in zip((latents, tokens), block(latents, tokens), strict=True)
    ]
    for share in (*(each.float().mean() for each in kept), (kept[0] | kept[1]).float().mean()):
        assert 0.65 < share <= 0.99  # 3 of 4 images, and 15 of 16
    assert (kept[0] != kept[1]).float().mean() > 0.25


@pytest.mark.parametrize('out_type', ['avg_latents', 'featmap'])
def test_layer_depth(out_type):
    net = toy(BiXT, out_type=out_type)
    last = len(net.blocks) + 1
    depths = {
        'latents': 0,
        'tokenizer.proj.weight': 0,
        'tokenizer.pos_proj.bias': 0,
        'blocks.0.cross.norm1_latents.weight': 1,
        'blocks.2.cross.attn.rv_tokens.weight': 3,
        'norm.weight': last,
    }
    for name, depth in depths.items():
        assert net.get_layer_depth(name) == (depth, last + 1)
        assert net.get_layer_depth(f'backbone.{name}', 'backbone.') == (depth, last + 1)
    assert net.get_layer_depth('head.fc.weight', 'backbone.') == (last, last + 1)


@tokenizers
def test_initialization(tokenizer):
    """Xavier uniform, LeCun normal; biases 0, those of MLPs normal with 1e-6; as the authors do."""
    net = toy(BiXT, arch=dict(dim=192, depth=2, tokenizer=tokenizer, layer_scale=1e-5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.latents.std().item() == pytest.approx(0.02, rel=0.05)
    assert 'layer_scale' not in before and len([n for n in before if 'gamma' in n]) == 6 + 4
    for name, module in net.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
        elif name.endswith('pos_proj') or isinstance(module, nn.Conv2d):
            std = module.weight[0].numel() ** -0.5
            assert module.weight.std().item() == pytest.approx(std, rel=0.1)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.99 * bound < module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            if 'mlp' in name:
                assert module.bias.std().item() == pytest.approx(1e-6, rel=0.2)
            else:
                assert not module.bias.any()
        elif name.rpartition('.')[2].startswith('ls'):
            assert (module.gamma == 1e-5).all()


@out_types
@torch.no_grad()
def test_a_few_images_at_a_time(out, monkeypatch):
    """Blocks see parts of a large batch; with a hook or a wrapper they see it whole."""
    net, images, seen = net_of(**out).eval(), torch.randn(5, 3, 32, 48), []
    plain = bixt.BiXTBlock.forward

    def note(block, latents, tokens):
        seen.append((len(latents), len(tokens)))
        return plain(block, latents, tokens)

    def run():
        seen.clear()
        return net(images)

    monkeypatch.setattr(bixt.BiXTBlock, 'forward', note)
    whole, count = run(), len(net.blocks)
    assert seen == [(5, 5)] * count
    monkeypatch.setattr(inplace, 'MAP_BYTES', 4 * 4 * 6 * 64 * 4)
    parts = run()
    assert seen == [(3, 3)] * count + [(2, 2)] * count  # not four and one
    assert_close(parts, whole, 1e-5)
    kept = []
    hook = net.blocks[0].cross.attn.register_forward_hook(lambda *args: kept.append(args[1:]))
    assert_close(run(), whole, 1e-5)
    assert seen == [(5, 5)] * count
    copies = [[x.clone() for x in pair if x is not None] for pair in kept[0]]
    run()  # and what it kept stays as it was
    assert all(map(torch.equal, copies[1], [x for x in kept[0][1] if x is not None]))
    hook.remove()
    with torch.enable_grad():
        run()
    assert seen == [(5, 5)] * count


@out_types
@torch.no_grad()
def test_half_precision(out):
    images = torch.randn(2, 3, 32, 40)
    expected = net_of('conv', **out).eval()(images)
    for dtype in (torch.bfloat16, torch.float16):
        net = net_of('conv', **out).eval()
        with torch.autocast('cpu', dtype):
            mixed = net(images)
        for found in (mixed, net.to(dtype)(images.to(dtype))):
            for a, b in zip(found, expected, strict=True):
                assert (a.float() - b).norm() <= 0.06 * b.norm()
        assert found[0].dtype == dtype


def test_compiles_to_one_graph():
    arch = dict(dim=32, depth=3, num_latents=5)
    net, images = toy(BiXT, arch=arch, out_type='featmap'), torch.randn(2, 3, 40, 33)
    expected = gradients(net, images)
    net.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    outs = compiled(images)
    sum(out.sin().sum() for out in outs).backward()
    assert_close([*outs, *(p.grad for p in net.parameters())], expected, 1e-4)


@pytest.mark.parametrize(('tokenizer', 'strict'), [('patch', True), ('conv', False)])
def test_exports_for_all_sizes(tokenizer, strict):
    arch = dict(dim=32, depth=2, tokenizer=tokenizer)
    net = toy(BiXT, arch=arch, out_type='featmap').eval()
    sizes = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
    images = torch.randn(2, 3, 64, 96)
    program = torch.export.export(net, (images,), dynamic_shapes=(sizes,), strict=strict)
    assert 'mmbiformer' not in program.graph_module.code
    for size in ((3, 3, 64, 64), (1, 3, 101, 50)):
        images = torch.randn(size)
        assert_close(program.module()(images), net(images), 1e-5)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='ti_l64'), "arch='ti_l64' is unknown; choose one of .*'ti_l64_p16s8'"),
        (dict(arch=dict(depth=3)), r"needs 'dim' .* got \['depth'\]"),
        (dict(arch=dict(dim=64, heads=2)), r"may have .*'num_latents'.* got \['dim', 'heads'\]"),
        (dict(arch=dict(dim=48)), 'dim=48 must be a multiple of 32'),
        (dict(arch=dict(dim=64, depth=1)), 'depth=1 must be at least 2'),
        (dict(arch=dict(dim=64, num_latents=0)), 'num_latents=0 at least 1'),
        (dict(arch=dict(dim=64, stride=2)), 'stride=2 must be 4, 8 or 16'),
        (dict(arch=dict(dim=64, tokenizer='cnv')), "tokenizer='cnv'"),
        (dict(out_type='cls_token'), "out_type='cls_token' must be 'avg_latents', 'latents' or"),
        (dict(out_indices=0), "out_indices=0 is for out_type='featmap' only"),
        (dict(out_type='featmap', out_indices=3), 'rising numbers of blocks from 0 to 2'),
        (dict(out_type='featmap', out_indices=(-1, 0)), r'out_indices=\(-1, 0\) must be rising'),
        (dict(out_type='featmap', out_indices=()), r'out_indices=\(\) must be'),
        (dict(out_type='featmap', out_indices=-4), 'out_indices=-4 must be'),
        (dict(drop_path_rate=1.0), r'drop_path_rate=1.0 must lie in \[0, 1\)'),
        (dict(drop_path_rate=(0.1, -0.1)), 'drop_path_rate=-0.1 must lie'),
        (dict(frozen_stages=5), 'frozen_stages=5 must lie between -1 and the 4 blocks'),
        (dict(frozen_stages=4, out_type='featmap'), 'frozen_stages=4 .* the 3 blocks'),
        (dict(backend='fast'), "backend='fast' is unknown"),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        toy(BiXT, **kwargs)
