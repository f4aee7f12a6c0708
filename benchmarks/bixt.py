"""Time of BiXT on CPU beside its published formulation and beside plain transformers.

Examples:
    python -m benchmarks.bixt s8 --out benchmarks/results/cpu_bixt_s8.json
    python -m benchmarks.bixt tokens --quick
"""

import argparse
from functools import partial
from importlib.metadata import version

import torch

from benchmarks import cpu
from benchmarks.bixt_baseline import bixt_baseline
from mmbiformer.commands.faults import run_command
from mmbiformer.models import BiXT
from mmbiformer.ops import BIDIRECTIONAL_BACKENDS, bidirectional_attention

QUICK = dict(dim=32, depth=3, num_latents=8)
# Tokens of an image of 224x224, 448x448 and about 900x900 pixels at stride 4.
TOKENS = 3136, 12_544, 50_176


class Report(cpu.Report):
    """As for the other backbones."""

    module = 'benchmarks.bixt'


def bixt(args: argparse.Namespace) -> BiXT:
    """BiXT-Ti with patches of 16x16 pixels every 8 or 4, with the same weights each time."""
    torch.manual_seed(0)
    stride = int(args.model.removeprefix('s')) if args.model in ('s8', 's4') else 8
    return BiXT(dict(QUICK, stride=stride) if args.quick else f'ti_l64_p16s{stride}')


def candidate(name: str, args: argparse.Namespace) -> BiXT:
    """The published formulation or ours, with the same weights."""
    return bixt_baseline(bixt(args)) if name == 'published' else bixt(args)


def run_published(args: argparse.Namespace) -> None:
    """Beside the published formulation: forward, training step, memory."""
    x = cpu.image(args, 8, (224, 224))
    if args.peak:
        print(cpu.measure_peak(candidate(args.peak, args), x))
        return
    report = Report(args, batch=len(x), size=x.shape[2:])
    print(f'BiXT-Ti, {args.model}, batch {len(x)}, float32, {args.threads} threads')
    nets = {name: candidate(name, args).eval() for name in ('published', 'ours')}
    with torch.no_grad():
        published, ours = (net(x)[0] for net in nets.values())
    difference = ((published - ours).abs().max() / published.abs().max()).item()
    print(f'largest relative difference of the outputs: {difference:.1e}')
    report.note(difference=difference)
    report.time('forward', {name: cpu.forward(net, x) for name, net in nets.items()})
    steps = {name: cpu.training_step(net.train(), x) for name, net in nets.items()}
    report.time('training step', steps)
    report.peaks([*nets])


def run_rivals(args: argparse.Namespace) -> None:
    """Beside timm's DeiT-Ti and DeiT-S with patches of 16x16 pixels every 8: as many tokens."""
    import timm
    from timm.layers import PatchEmbed

    x = cpu.image(args, 8, (224, 224))
    report = Report(args, batch=len(x), size=x.shape[2:], timm=version('timm'))
    print(f'batch {len(x)}, stride 8, float32, {args.threads} threads')

    class HalfStride(PatchEmbed):
        """The same patches, half as far apart."""

        def __init__(self, *, patch_size: int, **kwargs: object) -> None:
            super().__init__(patch_size=patch_size // 2, **kwargs)
            proj = self.proj
            self.proj = torch.nn.Conv2d(
                proj.in_channels, proj.out_channels, patch_size, patch_size // 2, patch_size // 4
            )

    nets = {'BiXT-Ti/8': bixt(args)}
    for name, key in (('DeiT-Ti', 'deit_tiny'), ('DeiT-S', 'deit_small')):
        more = dict(depth=1) if args.quick else {}
        nets[name] = timm.create_model(
            f'{key}_patch16_224',
            num_classes=0,
            embed_layer=HalfStride,
            img_size=x.shape[2:],
            **more,
        )
    report.time('forward', {name: cpu.forward(net.eval(), x) for name, net in nets.items()})
    steps = {}
    for name, net in nets.items():
        run = net if name.startswith('BiXT') else _Tuple(net)
        steps[name] = cpu.training_step(run.train(), x)
    report.time('training step', steps)


class _Tuple(torch.nn.Module):
    """Gives the output as a tuple, as our backbones do."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.net(x),)


def run_tokens(args: argparse.Namespace) -> None:
    """Time of the operator by the number of tokens: 64 latents, 6 heads of 32 channels."""
    report = Report(args, latents=64, heads=6, channels=192)
    print(f'one image, forward and backward, float32, {args.threads} threads')
    counts = [n // 64 for n in TOKENS] if args.quick else TOKENS
    for count in counts:
        shapes = [(1, n, 192) for n in (64, 64, count, count)]
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        grads = [torch.randn(1, n, 192) for n in (64, count)]
        report.time(
            f'{count} tokens',
            {name: partial(_step, name, inputs, grads) for name in BIDIRECTIONAL_BACKENDS},
        )
    least, most = (f'{count} tokens' for count in (counts[0], counts[-1]))
    for name in BIDIRECTIONAL_BACKENDS:
        seconds = [report.record['seconds'][row][name] for row in (least, most)]
        growth = seconds[1] / seconds[0] * counts[0] / counts[-1]
        print(f'{name:10} time per token, {most} against {least}: {growth:.2f}x')


def _step(backend: str, inputs: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    outs = bidirectional_attention(*inputs, num_heads=6, backend=backend)
    torch.autograd.grad(outs, inputs, grads)


# The function of a command, and how often its steps are timed.
COMMANDS = dict(
    s8=(run_published, 7), s4=(run_published, 5), rivals=(run_rivals, 5), tokens=(run_tokens, 15)
)


if __name__ == '__main__':
    run_command(partial(cpu.main, __doc__, COMMANDS, 's8'))
