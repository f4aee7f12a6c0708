"""Predict images, folders of them and videos with any config of this project.

DIR/pictures gets the pictures; with --json, DIR/predictions.json gets boxes and masks in COCO's
format, or classes, and DIR/labels the label maps of a segmentor.

Examples:
    python tools/predict.py configs/maskrcnn_biformer_s_coco.py epoch_12.pth street.jpg --out out
    python tools/predict.py configs/biformer_s_in1k.py biformer_small_best.pth photos --out out \\
        --json --batch-size 8 --device cuda:1
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmbiformer.commands.faults import run_command
from mmbiformer.commands.options import add_config_options, read_config
from mmbiformer.commands.pictures import Pictures, Source, UnreadableError, find_sources
from mmbiformer.commands.predict import build_predictor
from mmbiformer.errors import UserError, escaped

NOT_ALL = 1


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f'exit status: 0, or {NOT_ALL} if a file could not be read and the others are done',
    )
    add_config_options(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('inputs', nargs='+', metavar='IMAGE|FOLDER|VIDEO', help='what to predict')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for the results')
    parser.add_argument('--json', action='store_true', help='write DIR/predictions.json as well')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        metavar='SCORE',
        help='lowest score of a box that is drawn; --json has all (default: 0.3)',
    )
    parser.add_argument('--batch-size', type=int, default=1, help='images at a time (default: 1)')
    parser.add_argument('--device', help='such as cuda:1 or cpu (default: a GPU if there is one)')
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f'--batch-size {args.batch_size}: give 1 or more')
    return args


def main() -> None:
    """Predict one image after another; name those that cannot be read at the end."""
    args = parse_args()
    cfg, out = read_config(args), Path(args.out)
    if not Path(args.checkpoint).is_file() and '://' not in args.checkpoint:
        raise UserError(f'there is no checkpoint {args.checkpoint}')
    sources = find_sources(args.inputs, out)
    predictor = build_predictor(cfg, args.checkpoint, args.device, out, args.score_thr)
    problems: list[str] = []
    columns = TextColumn('predicting'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar, pictures = Progress(*columns, console=Console(stderr=True)), Pictures(out / 'pictures')
    done = 0
    with bar, pictures:
        task = bar.add_task('', total=sum(source.frames() for source in sources))
        for batch in batches(read(sources, problems), args.batch_size):
            samples = predictor.predict([image for *_, image in batch])
            for (source, frame, image), sample in zip(batch, samples, strict=True):
                if args.json:
                    predictor.record(source, frame, image, sample)
                pictures.write(source, predictor.draw(image, sample))
            done += len(batch)
            bar.update(task, completed=done)
    print(f'{done} image(s) predicted: {out / "pictures"}')
    if args.json:
        print(f'results: {predictor.write()}')
    if problems:
        print('error: not read:', *map(escaped, problems), sep='\n  ', file=sys.stderr)
        sys.exit(NOT_ALL)


Read = tuple[Source, int | None, np.ndarray]


def read(sources: Iterable[Source], problems: list[str]) -> Iterator[Read]:
    """Decode images and the frames of videos.

    Args:
        sources: The files.
        problems: Gets a line for each file that cannot be read.

    Yields:
        tuple: The file, the number of the frame from 0 or None, and the image.
    """
    for source in sources:
        try:
            for number, image in enumerate(source.read()):
                yield source, number if source.is_video else None, image
        except UnreadableError as error:
            problems.append(f'{source.path}: {error}')


def batches(images: Iterable[Read], size: int) -> Iterator[list[Read]]:
    """Group neighbours of one size, because MMSegmentation takes no others in a batch."""
    for _, group in itertools.groupby(images, key=lambda one: one[-1].shape):
        while batch := [*itertools.islice(group, size)]:
            yield batch


if __name__ == '__main__':
    run_command(main)
