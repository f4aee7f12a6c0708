"""Print a config with everything it inherits.

Example:
    python tools/misc/print_config.py configs/biformer_s_in1k.py --cfg-options randomness.seed=1
"""

import argparse

from mmbiformer.commands.faults import run_command
from mmbiformer.commands.options import add_config_options, read_config


def main() -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_options(parser)
    print(read_config(parser.parse_args()).pretty_text)


if __name__ == '__main__':
    run_command(main)
