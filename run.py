"""The one entry point: `python run.py` lists the commands."""

import sys

from moepp.cli import main

if __name__ == "__main__":  # processes that `spawn` starts import this file
    sys.exit(main())
