"""The packed text as token files, one folder per packed tokenizer: `python -m window.tokens PACK FOLDER`.

Encoding runs on all cores. What is there already is left as it is.
"""

import os
import re
import sys
from pathlib import Path

from moepp.data.prepare import prepare
from moepp.data.settings import DataConfig
from window.pack import CORPUS, VAL_SHARE


def encode(pack: Path, folder: Path) -> None:
    """FOLDER/<vocabulary>/ holds the tokens of each tokenizer-<vocabulary>.json of `pack`."""
    for tokenizer in sorted(pack.glob("tokenizer-*.json")):
        vocabulary = re.search(r"\d+", tokenizer.stem)[0]
        if (folder / vocabulary).exists():
            continue
        config = DataConfig(
            corpus="text", path=str(pack / CORPUS), tokenizer=str(tokenizer), vocab_size=int(vocabulary),
            val_share=VAL_SHARE, cache=str(folder / "cache"), seq_len=1,
        )  # fmt: skip
        files = prepare(config, progress=False)
        os.rename(files.path, folder / vocabulary)
        train, val = files.header.train, files.header.val
        print(f"vocabulary {vocabulary}: {train.tokens:,} training tokens, {val.tokens:,} held out", flush=True)


if __name__ == "__main__":
    encode(Path(sys.argv[1]), Path(sys.argv[2]))
