"""The one entry point: `python run.py` lists the commands."""

import sys

from moepp.program import missing

try:
    from moepp.cli import main
except ModuleNotFoundError as error:
    sys.exit(missing(error.name))

if __name__ == "__main__":  # processes that `spawn` starts import this file
    sys.exit(main())
