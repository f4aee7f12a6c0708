"""Comparison of an exported file with PyTorch, near-ties of the routing included."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from .graph import Exportable

TOLERANCE = 1e-4
"""Largest difference of a file from PyTorch, in multiples of the largest entry of an output."""
NEAR_TIE = 1e-5
"""Affinities closer than this, in multiples of the largest of the image, may be ranked either way:
they are sums of thousands of products in float32."""

Runner = Callable[[Tensor], list[Tensor]]
"""Runs a file: images to its outputs."""


class NearestTie(TorchFunctionMode):
    """Watches the routing: how close the choice of regions came to another choice.

    Attributes:
        gap (float): The smallest gap between the last chosen affinity and the first left out, in
            multiples of the largest affinity of the layer.
    """

    gap = math.inf

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.topk and args[1] < args[0].shape[-1]:
            affinity, k = args[:2]
            last, first = affinity.topk(k + 1).values[..., -2:].unbind(-1)
            self.gap = min(self.gap, ((last - first).min() / affinity.abs().max()).item())
        return func(*args, **(kwargs or {}))


def _difference(found: Tensor, expected: Tensor) -> float:
    """The difference of one output, see :func:`compare`."""
    if found.shape != expected.shape:
        return math.inf
    if not found.numel():
        return 0.0
    if not found.is_floating_point():  # labels: classes may be as likely as each other
        return (found != expected).float().mean().item()
    # max() over Python floats passes over NaN.
    if not (found.isfinite().all() and expected.isfinite().all()):
        return math.inf
    if torch.equal(found, expected):
        return 0.0  # also where all entries are zero
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(net: Exportable, run: Runner, images: Tensor) -> tuple[float, float]:
    """Run a file and PyTorch on the same images.

    Args:
        net: What was exported.
        run: Runs the file.
        images: What the file takes.

    Returns:
        tuple[float, float]: The largest difference of any output, in multiples of the largest entry
        of that output, or the share of labels that differ, infinite if shapes differ or anything is
        not finite; and the gap of :class:`NearestTie`.
    """
    with torch.no_grad(), NearestTie() as tie:
        expected = net(images)
    pairs = zip(run(images), expected, strict=True)
    return max(_difference(*pair) for pair in pairs), tie.gap


def check(net: Exportable, run: Runner, size: tuple[int, int], images: int = 5) -> str:
    """Check that a file gives what PyTorch gives, at another size than it was traced at.

    A region is routed to the k most similar regions. Where two affinities are equal but for
    rounding, PyTorch and the file may choose differently, and the maps then differ there. An image
    is passed over as such a near-tie only if PyTorch's affinities show one, and one image at least
    must agree everywhere.

    Args:
        net: What was exported.
        run: Runs the file.
        size: Height and width of the images to check with.
        images: How many to try. Defaults to 5.

    Returns:
        str: The result in words.

    Raises:
        UserError: If the file gives something else.
    """
    generator = torch.Generator().manual_seed(0)
    for ties in range(images):
        batch = net.sample(size, generator)
        found = run(batch)
        difference, gap = compare(net, lambda _, found=found: found, batch)
        if difference <= TOLERANCE:
            after = f', after {ties} with near-ties in the routing' if ties else ''
            if not found[0].numel():
                after += '; both find nothing there, so compare on images of yours by test_onnx.py'
            return f'equal to PyTorch to {difference:.1e} at {size[0]}x{size[1]}{after}'
        if gap > NEAR_TIE:
            break
    raise UserError(
        f'the file differs from PyTorch by {difference:.1e} of the largest output on an image of '
        f'{size[0]}x{size[1]} (nearest tie in the routing: {gap:.1e}), so it is not kept; please '
        'report it with the versions of torch and of the runtime'
    )
