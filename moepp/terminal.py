"""The terminal: how wide a line is, whether it takes colour, and that nobody waits before it without a word."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import click

WIDE = "moepp.wide"  # of a command's context: `--wide` was given
FIRST_WORD = 3.0  # seconds, a terminal's; a log file gets it later and then a line a minute
LOG_WORD, LOG_EVERY = 8.0, 60.0


def width() -> int | None:
    """Columns of a line, 80 where there is no terminal; None where the command was given `--wide`."""
    context = click.get_current_context(silent=True)
    return None if context and context.meta.get(WIDE) else shutil.get_terminal_size().columns


def painted(text: str, stream: TextIO | None = None, **style: object) -> str:
    """`text` as click styles it (fg="red", bold=True) where the stream, standard output unless given, is a terminal."""
    coloured = (stream or sys.stdout).isatty() and "NO_COLOR" not in os.environ
    return click.style(text, **style) if coloured else text


@contextmanager
def working(what: str) -> Iterator[None]:
    """Says on standard error what takes long and for how long it has. On a terminal the line is gone at the end."""
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(what, over, sys.stderr), daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _tell(what: str, over: threading.Event, stream: TextIO) -> None:
    started, live = time.monotonic(), stream.isatty()
    begin, end, every = ("\r", "", 1.0) if live else ("", "\n", LOG_EVERY)
    said = over.wait(FIRST_WORD if live else LOG_WORD)
    while not said:
        print(f"{begin}{what}: {time.monotonic() - started:.0f} s", end=end, file=stream, flush=True)
        if said := over.wait(every):
            print("\r\x1b[K" if live else "", end="", file=stream, flush=True)
