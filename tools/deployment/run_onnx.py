"""Run an exported model on images, without torch and the OpenMMLab libraries.

Needs numpy, Pillow and onnxruntime. This file runs by itself: copy it to where the model goes. The
model is what export_onnx.py writes; it says itself how images are resized and what its outputs are.

Examples:
    python run_onnx.py model.onnx image.jpg other.png --out pictures
    python run_onnx.py model.onnx image.jpg --json > result.json
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw

COLOURS = (0x1F77B4, 0xFF7F0E, 0x2CA02C, 0xD62728, 0x9467BD, 0x8C564B, 0xE377C2, 0xBCBD22, 0x17BECF)
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


class Model:
    """An exported model.

    Args:
        path: The file.

    Attributes:
        facts (dict): What the file says: ``task``, ``canvas``, ``resize``, ``classes``.

    Raises:
        ValueError: If export_onnx.py has not written the file, or only the backbone's maps.
    """

    def __init__(self, path: str | Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        about = self.session.get_modelmeta().custom_metadata_map
        if 'mmbiformer' not in about:
            raise ValueError(
                f'{path} does not say what it holds; export the whole model by export_onnx.py'
            )
        self.facts = json.loads(about['mmbiformer'])
        self.names = [each.name for each in self.session.get_outputs()]

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Run on one image.

        Args:
            image: RGB, (H, W, 3), uint8, of any size.

        Returns:
            dict[str, np.ndarray]: In pixels of this image. Classification: ``scores`` (classes,).
            Segmentation: ``labels`` (H, W). Detection: ``boxes`` (N, 4) as left, top, right,
            bottom, ``scores`` (N,), ``labels`` (N,), and ``masks`` (N, H, W) if the model has them.

        Raises:
            ValueError: If the image has another shape or type.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f'the image is {image.dtype} of shape {image.shape}; give RGB as uint8 of shape '
                '(height, width, 3)'
            )
        height, width = image.shape[:2]
        small = self.prepare(image)
        outputs = self.run(small)
        if self.facts['task'] == 'classification':
            powers = np.exp(outputs['logits'] - outputs['logits'].max())
            return dict(scores=powers / powers.sum())
        if self.facts['task'] == 'segmentation':
            return dict(labels=nearest(outputs['labels'], height, width))
        scale = width / small.shape[1], height / small.shape[0]
        boxes = outputs['boxes'] * np.array([*scale, *scale], np.float32)
        found = dict(boxes=boxes, scores=outputs['scores'], labels=outputs['labels'])
        if 'masks' in outputs:
            found['masks'] = paste(
                outputs['masks'], boxes, height, width, self.facts['mask_threshold']
            )
        return found

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Run on an image (H, W, 3) that fits the canvas; give the outputs as they are.

        Raises:
            ValueError: If the image is larger.
        """
        (height, width), most = image.shape[:2], self.facts['canvas']
        if height > most[0] or width > most[1]:
            raise ValueError(
                f'the image has {height}x{width} pixels and the file takes {most[0]}x{most[1]}; '
                'export with a larger --shape'
            )
        outputs = self.session.run(None, {'images': image[None]})
        found = dict(zip(self.names, outputs, strict=True))
        if self.facts['task'] == 'detection':
            return found
        return {name: x[0] for name, x in found.items()}

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The steps of the config's test pipeline; then make it fit the canvas."""
        for step in self.facts['resize']:
            kind = step['type'].rpartition('.')[2]
            height, width = image.shape[:2]
            if kind == 'CenterCrop':
                size = step['crop_size']
                rows, cols = (size, size) if isinstance(size, int) else size
                top = max(0, round((height - rows) / 2))
                left = max(0, round((width - cols) / 2))
                image = image[top : top + rows, left : left + cols]
                continue
            if kind == 'ResizeEdge':
                factor = step['scale'] / min(height, width)
                rows, cols = int(height * factor), int(width * factor)
            elif kind == 'ResizeToMultiple':
                step_size = step.get('size_divisor', 32)
                rows, cols = (-(-side // step_size) * step_size for side in (height, width))
            elif step.get('keep_ratio'):
                long, short = max(step['scale']), min(step['scale'])
                factor = min(long / max(height, width), short / min(height, width))
                rows, cols = (int(side * factor + 0.5) for side in (height, width))
            else:
                cols, rows = np.broadcast_to(step['scale'], 2)
            image = resize(image, rows, cols, step)
        height, width = image.shape[:2]
        most = self.facts['canvas']
        factor = min(most[0] / height, most[1] / width)
        if self.facts['task'] == 'classification':
            return resize(image, *most, {})
        if factor < 1:
            rows = max(1, min(most[0], round(height * factor)))
            cols = max(1, min(most[1], round(width * factor)))
            image = resize(image, rows, cols, {})
        return image


def resize(image: np.ndarray, rows: int, cols: int, step: dict) -> np.ndarray:
    """Resize as the step's library does: Pillow, or OpenCV's bilinear without smoothing."""
    if image.shape[:2] == (rows, cols):
        return image
    if step.get('backend') == 'pillow':
        how = BICUBIC if step.get('interpolation') == 'bicubic' else BILINEAR
        return np.asarray(Image.fromarray(image).resize((int(cols), int(rows)), how))
    x = image.astype(np.float32)
    for axis, length in ((0, rows), (1, cols)):
        old = x.shape[axis]
        place = ((np.arange(length) + 0.5) * (old / length) - 0.5).clip(0, old - 1)
        first = place.astype(int)
        second = np.minimum(first + 1, old - 1)
        share = (
            (place - first).astype(np.float32).reshape([-1 if i == axis else 1 for i in (0, 1, 2)])
        )
        x = x.take(first, axis) * (1 - share) + x.take(second, axis) * share
    return (x + 0.5).clip(0, 255).astype(np.uint8)


def nearest(labels: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Resize a map of labels."""
    y = (np.arange(rows) + 0.5) * labels.shape[0] / rows
    x = (np.arange(cols) + 0.5) * labels.shape[1] / cols
    return labels[y.astype(int)[:, None], x.astype(int)]


def paste(
    masks: np.ndarray, boxes: np.ndarray, height: int, width: int, threshold: float
) -> np.ndarray:
    """Paint the masks of boxes, (N, h, w), into images: (N, height, width), bool."""
    out = np.zeros((len(masks), height, width), bool)
    for mask, box, painted in zip(masks, boxes, out, strict=True):
        left, top, right, bottom = box.tolist()
        x0, y0 = max(0, int(left) - 1), max(0, int(top) - 1)
        x1, y1 = min(width, int(right) + 2), min(height, int(bottom) + 2)
        if x1 <= x0 or y1 <= y0 or right <= left or bottom <= top:
            continue
        rows, cols = mask.shape
        y = (np.arange(y0, y1) + 0.5 - top) / (bottom - top) * rows - 0.5
        x = (np.arange(x0, x1) + 0.5 - left) / (right - left) * cols - 0.5
        padded = np.pad(mask, 1)  # nothing is outside of the box
        y, x = (y + 1).clip(0, rows + 1), (x + 1).clip(0, cols + 1)
        i, j = np.minimum(y.astype(int), rows), np.minimum(x.astype(int), cols)
        dy, dx = (y - i)[:, None], x - j
        upper = padded[i][:, j] * (1 - dx) + padded[i][:, j + 1] * dx
        lower = padded[i + 1][:, j] * (1 - dx) + padded[i + 1][:, j + 1] * dx
        painted[y0:y1, x0:x1] = upper * (1 - dy) + lower * dy >= threshold
    return out


def name_of(facts: dict, label: int) -> str:
    """The name of a class, or its number."""
    return facts['classes'][label] if label < len(facts['classes']) else str(label)


def as_json(facts: dict, found: dict[str, np.ndarray]) -> dict:
    """The result in plain values: five likeliest classes, pixels of each class, or the boxes."""
    if facts['task'] == 'classification':
        best = np.argsort(-found['scores'])[:5]
        return {'classes': [[name_of(facts, i), float(found['scores'][i])] for i in best.tolist()]}
    if facts['task'] == 'segmentation':
        labels, counts = np.unique(found['labels'], return_counts=True)
        pairs = zip(labels.tolist(), counts.tolist(), strict=True)
        return {'pixels': {name_of(facts, label): count for label, count in pairs}}
    keys = ('boxes', 'scores', 'labels')
    boxes = [
        dict(box=[round(side, 2) for side in box], score=score, label=name_of(facts, label))
        for box, score, label in zip(*(found[key].tolist() for key in keys), strict=True)
    ]
    for each, mask in zip(boxes, found.get('masks', ()), strict=False):
        each['area'] = int(mask.sum())
    return {'objects': boxes}


def draw(facts: dict, image: np.ndarray, found: dict[str, np.ndarray], least: float) -> Image.Image:
    """Paint the result over the image."""
    painted = image.astype(np.float32)

    def colour(label: int) -> tuple[int, int, int]:
        return tuple(COLOURS[label % len(COLOURS)].to_bytes(3, 'big'))

    if facts['task'] == 'segmentation':
        for label in np.unique(found['labels']).tolist():
            place = found['labels'] == label
            painted[place] = 0.5 * painted[place] + 0.5 * np.array(colour(label))
    for i, mask in enumerate(found.get('masks', ())):
        if found['scores'][i] >= least:
            paint = np.array(colour(int(found['labels'][i])))
            painted[mask] = 0.5 * painted[mask] + 0.5 * paint
    picture = Image.fromarray(painted.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    if facts['task'] == 'classification':
        best = int(found['scores'].argmax())
        pen.text((4, 4), f'{name_of(facts, best)} {found["scores"][best]:.2f}', fill='white',
                 stroke_width=1, stroke_fill='black')  # fmt: skip
    if facts['task'] == 'detection':
        columns = (found[key].tolist() for key in ('boxes', 'scores', 'labels'))
        for box, score, label in zip(*columns, strict=True):
            if score >= least:
                left, top, right, bottom = box
                pen.rectangle((left, top, right, bottom), outline=colour(label), width=2)
                pen.text((left + 3, top + 2), f'{name_of(facts, label)} {score:.2f}', fill='white',
                         stroke_width=1, stroke_fill='black')  # fmt: skip
    return picture


def main() -> int:
    """Run on each image; returns 1 if some cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', help='file of export_onnx.py')
    parser.add_argument('images', nargs='+', metavar='IMAGE')
    parser.add_argument('--out', type=Path, metavar='DIR', help='paint the results into a folder')
    parser.add_argument('--json', action='store_true', help='print the results as JSON')
    parser.add_argument('--score', type=float, default=0.3, help='least score that is painted')
    args = parser.parse_args()
    try:
        model = Model(args.model)
    except Exception as error:
        parser.error(f'{args.model}: {error}')
    results, failed = {}, 0
    for path in args.images:
        try:
            with Image.open(path) as file:
                image = np.asarray(file.convert('RGB'))
        except OSError as error:
            print(f'{path} cannot be read as an image: {error}', file=sys.stderr)
            failed = 1
            continue
        found = model(image)
        results[path] = as_json(model.facts, found)
        if not args.json:
            print(path, json.dumps(results[path]))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            target = args.out / f'{Path(path).stem}.png'
            draw(model.facts, image, found, args.score).save(target)
    if args.json:
        print(json.dumps(results))
    return failed


if __name__ == '__main__':
    sys.exit(main())
