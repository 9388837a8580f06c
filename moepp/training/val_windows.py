"""The loss of every held-out window at the end of a run, with the document it begins in: what an interval needs to know
how much a difference between two runs depends on the text that was held out.
"""

import csv
from io import StringIO

import lightning.pytorch as pl
import numpy as np

from moepp.data.batches import TokenDataModule
from moepp.data.token_files import TokenFiles
from moepp.records import VAL_WINDOWS, RunRecord, write_text
from moepp.training.module import LanguageModel


def write_windows(record: RunRecord, trainer: pl.Trainer, module: LanguageModel, data: TokenDataModule) -> None:
    """A row per window of the last validation: its number, its document, its mean loss in nats. All ranks call it."""
    by_rank = module.val_window_nats.compute().cpu().numpy()
    if not trainer.is_global_zero:
        return
    windows, world = data.validated_windows(), trainer.world_size
    place = np.concatenate([np.arange(rank, len(windows), world) for rank in range(world)])  # as val_dataloader deals
    nats = by_rank[place.argsort()]
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["window", "document", "nats"])
    documents = documents_of(data.files, windows, data.config.seq_len)
    rows.writerows([w, d, f"{n:.4f}"] for w, d, n in zip(windows, documents, nats, strict=True))
    write_text(record.path / VAL_WINDOWS, text.getvalue())


def documents_of(tokens: TokenFiles, windows: np.ndarray, seq_len: int) -> np.ndarray:
    """The number of the document that the first target of each window is of; all 0 where nothing separates them."""
    end_of_text = tokens.header.end_of_text
    ends = np.flatnonzero(tokens.val == (-1 if end_of_text is None else end_of_text))
    return np.searchsorted(ends, windows * seq_len + 1, side="left")
