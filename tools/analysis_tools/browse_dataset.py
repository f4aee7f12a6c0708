"""Look at training images as a config loads and augments them, with their ground truth.

Runs the host library's own tool, whose options follow the config.

Examples:
    python tools/analysis_tools/browse_dataset.py configs/maskrcnn_biformer_s_coco.py \\
        --output-dir look --not-show
    python tools/analysis_tools/browse_dataset.py configs/biformer_s_in1k.py --help
"""

import argparse

from mmbiformer.commands.faults import run_command
from mmbiformer.commands.host_tools import run_host_tool
from mmbiformer.commands.options import add_config_options, read_config
from mmbiformer.commands.preflight import check_data

PATHS = dict(
    mmdet='analysis_tools/browse_dataset.py',
    mmseg='analysis_tools/browse_dataset.py',
    mmpretrain='visualization/browse_dataset.py',
)


def main() -> None:
    """Check that config and data are there, then leave it to the host."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    add_config_options(parser)
    args, others = parser.parse_known_args()
    cfg = read_config(args)
    if not {'-h', '--help'} & {*others}:
        check_data(cfg, ('train',))
    run_host_tool(cfg, PATHS)


if __name__ == '__main__':
    run_command(main)
