"""The one entry point: `python run.py` lists the commands."""

import sys

from moepp.cli import main

sys.exit(main())
