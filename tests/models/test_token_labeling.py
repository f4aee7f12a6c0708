"""Token labeling: the losses, MixToken, and the three families."""

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from mmbiformer.datasets.label_maps import TokenTarget
from mmbiformer.errors import UserError
from tests.helpers.configs import load

pytest.importorskip('mmpretrain')
from mmpretrain.structures import DataSample

from mmbiformer.commands.runner import build_model
from mmbiformer.models.token_labeling import Box, TokenLabelHead

ARCH = dict(depths=(1, 1, 1, 1), embed_dims=(64, 128, 256, 512))
BIXT = dict(arch=dict(dim=64, depth=3, num_latents=4, stride=16), out_type='featmap')
# A backbone's changes, channels, and tokens of an image of 96x64 pixels.
FAMILIES = {
    'BiFormer': (dict(arch=dict(ARCH, mlp_ratio=1)), 512, (3, 2)),
    'DeBiFormer': (dict(arch=dict(ARCH, mlp_ratios=(1, 1, 1, 1))), 512, (3, 2)),
    'BiXT': (BIXT, 64, (6, 4)),
}


def classifier(family='BiFormer', **changes):
    cfg = load('biformer_s_tokenlabel_in1k')
    backbone, channels, _ = FAMILIES[family]
    if family == 'BiXT':
        cfg.model.backbone = dict(type='mmbiformer.BiXT', **backbone)
    else:
        cfg.model.backbone.update(type=f'mmbiformer.{family}', drop_path_rate=0.0, **backbone)
    cfg.model.head.update(num_classes=10, in_channels=channels)
    cfg.data_preprocessor.num_classes = 10
    for name, value in changes.items():
        cfg.model[name] = value
    model = build_model(cfg)
    with torch.no_grad():
        torch.nn.init.normal_(model.head.fc.weight)
        torch.nn.init.normal_(model.head.token_fc.weight)
    return model


def samples(size, count=2, classes=10, present=4):
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        numbers = np.sort(rng.choice(classes, present, replace=False))
        pooled = rng.random(present, dtype=np.float32) * 5
        tokens = rng.random((present, *size), dtype=np.float32) * 5
        sample = DataSample(metainfo=dict(img_path=f'{i}.jpg'))
        sample.set_field(TokenTarget(numbers, pooled, tokens), 'token_target')
        found.append(sample)
    return found


def plain_loss(pooled, tokens, data_samples, weight, smoothing, box=None):
    """The formula, place by place."""

    def probabilities(target, scores):
        dense = torch.zeros(10)
        for number, score in zip(target.classes, scores, strict=True):
            dense[int(number)] = float(score)
        return dense.softmax(0)

    def cross_entropy(scores, target):
        target = target * (1 - smoothing) + smoothing / 10
        return -(target * log_softmax(scores, 0)).sum()

    count, height, width, _ = tokens.shape
    targets = [sample.token_target for sample in data_samples]
    whole = [probabilities(target, target.pooled) for target in targets]
    mixed, token_losses = [], []
    for b in range(count):
        area = 0
        for y in range(height):
            for x in range(width):
                inside = box and box.top <= y < box.bottom and box.left <= x < box.right
                area += bool(inside)
                owner = count - 1 - b if inside else b  # whose content is at this place
                target = targets[owner]
                expected = probabilities(target, target.tokens[:, y, x])
                token_losses.append(cross_entropy(tokens[b, y, x], expected))
        part = area / (height * width)
        mixed.append((1 - part) * whole[b] + part * whole[count - 1 - b])
    losses = [cross_entropy(*pair) for pair in zip(pooled, mixed, strict=True)]
    return sum(losses) / count, weight * sum(token_losses) / len(token_losses)


@pytest.mark.parametrize('weight', [0.5, 1.0])
@pytest.mark.parametrize('box', [None, Box(1, 3, 0, 2, grid=(4, 3))])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_losses_are_the_formula(weight, box, smoothing):
    loss = dict(type='LabelSmoothLoss', label_smooth_val=smoothing, mode='original')
    load('biformer_s_tokenlabel_in1k')  # sets the scope
    head = TokenLabelHead(10, 8, token_loss_weight=weight, loss=loss)
    torch.nn.init.normal_(head.fc.weight)
    torch.nn.init.normal_(head.token_fc.weight)
    x, data_samples = torch.randn(3, 8, 4, 3), samples((4, 3), count=3)
    found = head.loss((x,), data_samples, box=box)
    pooled = head.fc(x.mean((2, 3)))
    tokens = head.token_fc(x.permute(0, 2, 3, 1))
    expected = plain_loss(pooled, tokens, data_samples, weight, smoothing, box)
    torch.testing.assert_close((found['loss_pooled'], found['loss_token']), expected)


def test_box_of_a_finer_map():
    x = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 16, 8)  # images of zeros and of ones
    mixed = Box(1, 3, 0, 1, grid=(4, 2)).exchange(x, 2)
    expected = torch.zeros(16, 8)
    expected[4:12, :4] = 1
    assert torch.equal(mixed[0, 0], expected) and torch.equal(mixed[1, 0], 1 - expected)
    assert Box(1, 3, 0, 1, grid=(4, 2)).kept == 1 - 2 / 8


@pytest.mark.parametrize('family', FAMILIES)
def test_mixed_tokens_are_where_their_labels_are(family):
    """Exchanging boxes of the images, on the grid of the last map, gives the same tokens inside."""
    model = classifier(family).eval()
    grid = FAMILIES[family][2]
    box = Box(0, grid[0], 0, grid[1] // 2, grid=grid)  # the left half of all images
    images = torch.randn(2, 3, 96, 64)
    module, seen = model.backbone.get_submodule(model.backbone.embedding[0]), []
    with torch.no_grad():
        plain = module(images)
        with model.mixed(box):
            module.register_forward_hook(lambda module, args, out: seen.append(out))
            model.extract_feat(images)
        first = model.backbone.embedding[1]
        half = plain.shape[first + 1] // 2
        expected = plain.clone()
        expected.narrow(first + 1, 0, half).copy_(plain.flip(0).narrow(first + 1, 0, half))
        torch.testing.assert_close(seen[0], expected)
        assert plain.shape[first] % grid[0] == plain.shape[first + 1] % grid[1] == 0
        seen.clear()
        model.extract_feat(images)  # and without the box no longer
        torch.testing.assert_close(seen[0], plain)


@pytest.mark.parametrize('family', FAMILIES)
def test_trains_and_predicts(family):
    """A step reaches every parameter; the prediction is the pooled one."""
    model = classifier(family).train()
    data_samples, images = samples(FAMILIES[family][2]), torch.randn(2, 3, 96, 64)
    np.random.seed(1)
    losses = model(images, data_samples, mode='loss')
    loss, _ = model.parse_losses(losses)
    torch.testing.assert_close(loss, sum(losses.values()))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.head.token_fc.weight.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        (predicted, _) = model(images, [DataSample(), DataSample()], mode='predict')
        scores = model.head.fc(model.backbone(images)[-1].mean((2, 3)))
    torch.testing.assert_close(predicted.pred_score, scores[0].softmax(0))


def test_the_box_is_drawn_as_cutmix_draws_it():
    model = classifier()
    boxes = [model.draw_box((7, 7)) for _ in range(2000)]
    assert len({*boxes}) > 100
    assert all(0 <= b.top <= b.bottom <= 7 and 0 <= b.left <= b.right <= 7 for b in boxes)
    # The mean would be 1/2 if sides were not rounded down and boxes not cut at the border.
    assert np.mean([box.kept for box in boxes]) == pytest.approx(0.76, abs=0.03)


def test_mistakes_are_named():
    model = classifier()
    with pytest.raises(UserError, match=r'has 3x2 tokens, .* of 0\.jpg was cropped to 7x7'):
        model(torch.randn(2, 3, 96, 64), samples((7, 7)), mode='loss')
    with pytest.raises(UserError, match='has class 19, the head has 10 classes'):
        many = samples((3, 2), classes=20, present=20)
        model(torch.randn(2, 3, 96, 64), many, mode='loss')
    with pytest.raises(UserError, match='needs a map'):
        model.head.loss((torch.randn(2, 512),), samples((3, 2)))


def test_another_backbone():
    """One of MMPretrain's, with MixToken after its stem and without."""
    changes = dict(backbone=dict(type='ResNet', depth=18))
    with pytest.raises(UserError, match='where ResNet makes tokens'):
        classifier(**changes)
    for options in (dict(mix_token=None), dict(embedding=('maxpool', 2))):
        model = classifier(**changes, **options).train()
        losses = model(torch.randn(2, 3, 96, 64), samples((3, 2)), mode='loss')
        assert torch.isfinite(sum(losses.values()))
