"""The demo's pictures and what it says at its end; tests/integration/test_demo.py runs it."""

import os
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from tests.helpers.configs import ROOT


@pytest.fixture(scope='module')
def demo():
    pytest.importorskip('mmdet')
    return runpy.run_path(str(ROOT / 'tools' / 'demo.py'), run_name='tool')


@pytest.fixture(scope='module')
def ending(demo):
    return demo['next_steps']('CONFIG CHECKPOINT', '--cfg-options a=b')


def test_commands_work_in_a_fresh_shell(ending):
    """Where the shell begins does not matter, and nothing has to be active."""
    lines = [line.strip() for line in ending.splitlines() if line.startswith('  ')]
    *begin, test, predict, _, _ = lines
    assert test == 'python tools/test.py CONFIG CHECKPOINT --show-dir shown --cfg-options a=b'
    assert predict.startswith('python tools/predict.py CONFIG CHECKPOINT IMAGE --out ')
    if sys.prefix == sys.base_prefix:  # nothing to activate
        begin.append(f'PATH={os.path.dirname(sys.executable)}:$PATH')
    show = 'pwd; python -c "import sys; print(sys.prefix)"'
    script = '\n'.join(['set -e', *begin, show])
    done = subprocess.run(
        ['env', '-i', f'PATH={os.defpath}', 'bash', '-c', script],
        cwd='/',
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split()) == (0, [str(ROOT), sys.prefix]), done.stderr


def test_names_files_that_exist(ending):
    for path in re.findall(r'(?:tools|docs)/\S+\.(?:py|md)', ending):
        assert (ROOT / path).is_file(), path


def instances(labels, boxes, scores=None):
    boxes = torch.tensor(boxes).float().view(-1, 4)
    found = InstanceData(labels=torch.tensor(labels, dtype=torch.long), bboxes=boxes)
    if scores is not None:
        found.scores = torch.tensor(scores)
    return found


LEFT, RIGHT, BELOW = [0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30]
TRUTH = [0, 1, 1], [LEFT, RIGHT, BELOW]


@pytest.mark.parametrize('with_masks', [False, True])
@pytest.mark.parametrize(
    ('labels', 'boxes', 'scores', 'partners'),
    [
        ([0, 1, 1], [LEFT, BELOW, RIGHT], [0.9, 0.8, 0.7], [0, 2, 1]),
        ([1], [LEFT], [0.9], [None]),  # another class
        ([0], [[0, 0, 10, 4]], [0.9], [None]),  # too small
        ([0, 0], [[0, 0, 10, 8], LEFT], [0.6, 0.9], [None, 0]),  # one object found twice
        ([], [], [], []),
    ],
)
def test_predictions_are_right_once(demo, labels, boxes, scores, partners, with_masks):
    both = instances(labels, boxes, scores), instances(*TRUTH)
    if with_masks:
        for each in both:
            each.masks = torch.zeros(len(each.labels), 40, 40, dtype=torch.bool)
            for mask, box in zip(each.masks, each.bboxes.int().tolist(), strict=True):
                mask[box[1] : box[3], box[0] : box[2]] = True
    assert demo['match'](*both, with_masks) == partners


def draw(demo, name, image, sample):
    """Draw a prediction; give the texts, and the picture."""
    figure = plt.figure(figsize=(4, 4), dpi=100)
    axes = figure.add_axes([0, 0, 1, 1])
    axes.axis('off')
    demo[name](axes, image, sample, predicted=True)
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    plt.close(figure)
    return [text.get_text() for text in axes.texts if text.get_text()], picture


def test_wrong_and_missed_instances_are_named(demo):
    sample = SimpleNamespace(
        classes=('disc', 'star'),
        gt_instances=instances(*TRUTH),
        pred_instances=instances([0, 0, 0], [LEFT, RIGHT, BELOW], [0.9, 0.8, 0.1]),
    )
    texts, _ = draw(demo, 'draw_instances', np.zeros((40, 40, 3), np.uint8), sample)
    assert sorted(texts) == ['disc 0.90', 'missed: star', 'missed: star', 'wrong: disc 0.80']


@pytest.mark.parametrize('label', range(7))
def test_outlines_are_seen_on_their_own_colour(demo, label):
    colour = (demo['COLOURS'][label] * 255).astype(np.uint8)
    sample = SimpleNamespace(
        classes='abcdefg',
        gt_instances=instances([label], [[5, 5, 35, 35]]),
        pred_instances=instances([label], [[5, 5, 35, 35]], [0.9]),
    )
    _, picture = draw(demo, 'draw_instances', np.tile(colour, (40, 40, 1)), sample)
    column = picture[200, 30:80].astype(int)  # across the left side
    assert np.abs(column - colour.astype(int)).max() > 60


def test_wrong_pixels_are_hatched(demo):
    image = np.full((40, 40, 3), 200, np.uint8)
    right = torch.zeros(1, 40, 40, dtype=torch.long)
    right[:, :20] = 1
    wrong = right.clone()
    wrong[:, 30:] = 2
    classes = 'background', 'a', 'b'
    pictures = []
    for predicted in (right, wrong):
        sample = SimpleNamespace(
            classes=classes,
            gt_sem_seg=SimpleNamespace(data=right),
            pred_sem_seg=SimpleNamespace(data=predicted),
        )
        pictures.append(draw(demo, 'draw_map', image, sample)[1])
    dark = [(picture < 60).all(-1) for picture in pictures]
    assert not dark[0].any()
    assert dark[1][310:].mean() > 0.1 and not dark[1][:290].any()


def test_a_wrong_class_is_called_so(demo):
    sample = SimpleNamespace(
        classes='ab', gt_label=1, pred_label=0, pred_score=torch.tensor([0.7, 0.3])
    )
    texts, _ = draw(demo, 'draw_label', np.zeros((8, 8, 3), np.uint8), sample)
    assert texts == ['wrong: a 0.70']


@pytest.mark.parametrize(
    ('model', 'found', 'line'),
    [
        ('biformer_t', {'mask AP': 0.546}, '  aim          met (mask AP 0.50)\n'),
        ('biformer_t', {'mask AP': 0.499}, '  aim          missed (mask AP 0.50)\n'),
        ('biformer_t', {}, '  aim          missed, nothing was detected (mask AP 0.50)\n'),
        ('debiformer_t', {'mask AP': 0.4}, ''),
    ],
)
def test_verdict(demo, model, found, line):
    assert demo['verdict'](demo['DEMOS']['maskrcnn'], model, found) == line


def test_aims_are_those_of_the_page(demo):
    page = (ROOT / 'docs/demo/README.md').read_text()
    for name, one in demo['DEMOS'].items():
        (row,) = re.findall(rf'^\| `{name}` \|.*', page, re.MULTILINE)
        label = next(iter(one.metrics.values())).removesuffix(' accuracy')
        assert f'| {label} {one.aim:.2f} |' in row
