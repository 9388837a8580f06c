"""Times how text becomes token ids on one core, beside a plain loop over tokenizers: `python scripts/prepare_speed.py`.

CPU seconds, medians of interleaved passes over the same documents, each with a tokenizer that has seen none of them.
Python's own library is the text unless --path names another: it is on every machine, and no word list.
"""

import argparse
import glob
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the library is loaded

from moepp.data.tokenizer import Writer, end_of_text, load_tokenizer, train_bpe

DTYPE = "<u2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=f"{sysconfig.get_path('stdlib')}/*.py", help="files, a document each")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    texts = [Path(file).read_text(errors="replace") for file in sorted(glob.glob(options.path))]
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "tokenizer.json", Path(folder) / "ids.bin"
        train_bpe(texts, options.vocabulary).save(str(path))
        ways = {"plain loop": plain, "ours": ours}
        times = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                times[name].append(_seconds(way, texts, path, out))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(f"{len(texts)} documents, {megabytes:.1f} MB, {options.vocabulary} ids, medians of {options.repeats}")
    for name, seconds in medians.items():
        print(f"{name:<12} {seconds:7.2f} s  {megabytes / seconds:6.2f} MB/s")
    print(f"ours is {medians['plain loop'] / medians['ours']:.2f} times as fast")


def plain(texts: list[str], path: Path, out: Path) -> None:
    """As one writes it down."""
    tokenizer = load_tokenizer(path)
    tokenizer.encode_special_tokens = True
    end = end_of_text(tokenizer)
    with open(out, "wb") as file:
        for text in texts:
            np.array([*tokenizer.encode(text, add_special_tokens=False).ids, end], DTYPE).tofile(file)


def ours(texts: list[str], path: Path, out: Path) -> None:
    """What a process of `prepare` does with a shard."""
    tokenizer = load_tokenizer(path)
    Writer(tokenizer, end_of_text(tokenizer), DTYPE).write(texts, out)


def _seconds(way: Callable[[list[str], Path, Path], None], texts: list[str], path: Path, out: Path) -> float:
    began = time.process_time()
    way(texts, path, out)
    return time.process_time() - began


if __name__ == "__main__":
    main()
