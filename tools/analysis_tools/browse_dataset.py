"""Look at training images as a config loads and augments them, with their ground truth.

Runs the host library's own tool, whose options follow the config: --help behind one shows them.

Examples:
    python tools/analysis_tools/browse_dataset.py configs/maskrcnn_biformer_s_coco.py \\
        --output-dir look --not-show
    python tools/analysis_tools/browse_dataset.py configs/biformer_s_in1k.py --help
"""

import argparse

from mmbiformer.engine.checks import CommandError, check_apart, check_data, check_writable
from mmbiformer.engine.command_line import add_config_options, read_config, run_command
from mmbiformer.engine.faults import faults_explained
from mmbiformer.engine.host_tools import run_host_tool

PATHS = dict(
    mmdet='analysis_tools/browse_dataset.py',
    mmseg='analysis_tools/browse_dataset.py',
    mmpretrain='visualization/browse_dataset.py',
)


def main() -> None:
    """Check that config and data are there, then leave it to the host."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    add_config_options(parser)
    parser.add_argument('--output-dir', '-o')  # the host's, to be looked at
    args, others = parser.parse_known_args()
    cfg = read_config(args)
    if not {'-h', '--help'} & {*others}:
        if cfg.get('train_dataloader') is None:
            raise CommandError(f'{cfg.filename} has no train_dataloader = dict(...) to look at')
        check_data(cfg, ('train',))
        if args.output_dir is not None:
            check_apart(cfg, args.output_dir, '--output-dir')
            check_writable(args.output_dir, '--output-dir')
    with faults_explained(cfg, ('train',)):
        run_host_tool(cfg, PATHS)


if __name__ == '__main__':
    run_command(main)
