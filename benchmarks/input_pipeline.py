"""Images a second that one core prepares for training: decode, augment, collate.

Example:
    python -m benchmarks.input_pipeline --out benchmarks/results/input_pipeline.json
"""

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import FUNCTIONS, init_default_scope

from benchmarks.cpu import processor
from mmbiformer.commands.faults import run_command

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = 'biformer_s_in1k', 'bixt_ti_l64_p16_in1k'
SIZE = 375, 500  # height and width in pixels, about ImageNet's mean
BATCH = 64


def photo(rng: np.random.Generator) -> np.ndarray:
    """An image that compresses as a photograph does: about 100 KB as JPEG."""
    image = cv2.resize(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8), SIZE[::-1])
    noise = rng.normal(0, 14, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def measure(name: str, paths: list[str], rounds: int) -> float:
    """Images a second of a config's training pipeline; the median of some rounds."""
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    init_default_scope(cfg.default_scope)
    pipeline = Compose(cfg.train_dataloader.dataset.pipeline)
    collate = FUNCTIONS.get(cfg.train_dataloader.collate_fn.type)
    found = []
    for _ in range(rounds + 1):  # the first warms up
        start = time.perf_counter()
        collate([pipeline(dict(img_path=path, gt_label=0)) for path in paths])
        found.append(len(paths) / (time.perf_counter() - start))
    return float(np.median(found[1:]))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, help='write the results as JSON')
    parser.add_argument('--quick', action='store_true', help='see that it works')
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    count, rounds = (2, 1) if args.quick else (BATCH, 7)
    with TemporaryDirectory() as folder:
        paths = [f'{folder}/{i}.jpg' for i in range(count)]
        for path in paths:
            cv2.imwrite(path, photo(rng), [cv2.IMWRITE_JPEG_QUALITY, 90])
        size = np.mean([Path(path).stat().st_size for path in paths])
        rates = {name: measure(name, paths, rounds) for name in CONFIGS}
    print(f'JPEG files of {SIZE[1]}x{SIZE[0]} pixels, {size / 1024:.0f} KB each, one core')
    for name, rate in rates.items():
        print(f'{name:24} {rate:6.0f} images a second')
    if args.out:
        facts = dict(
            images_per_second=rates,
            bytes=float(size),
            size=SIZE,
            rounds=rounds,
            processor=processor(),
            python=platform.python_version(),
            torch=torch.__version__,
            date=date.today().isoformat(),
        )
        args.out.write_text(json.dumps(facts, indent=1) + '\n')
        print(f'wrote {args.out}')


if __name__ == '__main__':
    run_command(main)
