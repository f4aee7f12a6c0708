"""The comparison of a file with PyTorch tells apart what differs and what is a near-tie."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmbiformer.errors import UserError
from mmbiformer.export.graph import Exportable
from mmbiformer.export.verify import NearestTie, check, compare

NAN, INF = math.nan, math.inf


class Net(nn.Module):
    """Gives an image's mean and, as routing does, the second largest of three affinities."""

    backbone = SimpleNamespace(in_channels=3)
    sample = Exportable.sample

    def __init__(self, gap):
        super().__init__()
        self.affinities = torch.tensor([3.0, 2.0 + gap, 2.0])

    def forward(self, images):
        return images.mean(1), self.affinities.topk(2).values[1:]


@pytest.mark.parametrize(
    ('found', 'expected', 'difference'),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.2),
        ([0.0, NAN], [0.0, 1.0], INF),
        ([0.0, NAN], [0.0, NAN], INF),
        ([0.0, 1.0], [0.0, NAN], INF),
        ([INF], [INF], INF),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1e-9], [0.0, 0.0], INF),
        ([1.0], [1.0, 1.0], INF),
        ([1, 2, 3, 4], [1, 2, 3, 9], 0.25),  # labels: the share that differs
        ([], [], 0.0),
    ],
)
@pytest.mark.parametrize('first', [False, True])
def test_difference_of_any_output(found, expected, difference, first):
    """The second output counts too, where max() would pass over NaN."""
    same = torch.ones(2)
    found, expected = torch.tensor(found), torch.tensor(expected)
    found, expected = ([x, same] if first else [same, x] for x in (found, expected))
    result = compare(lambda _: expected, lambda _: found, torch.ones(1))
    assert result == (pytest.approx(difference), INF)


def test_gap_of_the_routing():
    affinity = torch.tensor([[8.0, 4.0, 2.0, 2.0], [3.0, 2.5, 0.0, -9.0]])
    for k, gap in ((1, 0.5 / 9), (2, 2 / 9), (3, 0.0), (4, INF)):
        with NearestTie() as tie:
            affinity.topk(k, dim=-1)
        assert tie.gap == pytest.approx(gap)


def test_near_ties_are_passed_over():
    """An image that differs fails the file at once, unless PyTorch's affinities show a near-tie."""
    tie, calls = Net(1e-6), []

    def wrong_at_first(images):
        calls.append(images)
        return [x + (len(calls) == 1) for x in tie(images)]

    with pytest.raises(UserError, match=r'differs from PyTorch by .* so it is not kept'):
        check(Net(1.0), wrong_at_first, (6, 9))
    assert len(calls) == 1
    calls.clear()
    assert 'equal to PyTorch to 0.0e+00 at 6x9, after 1 with near-ties' in check(
        tie, wrong_at_first, (6, 9)
    )
    with pytest.raises(UserError, match='differs'):  # one image must agree everywhere
        check(tie, lambda images: [x + 1 for x in tie(images)], (6, 9))


def test_nothing_found_is_said():
    """A detector may find nothing in random images, which proves little."""

    class Blind(Net):
        def forward(self, images):
            return images.new_zeros(0, 4), images.new_zeros(0)

    assert 'both find nothing there' in check(Blind(1.0), Blind(1.0), (6, 9))
