from types import SimpleNamespace

import numpy as np
import torch

from moepp.records import VAL_WINDOWS, RunRecord
from moepp.training.val_windows import write_windows


def test_windows_of_two_ranks_are_told_in_order_with_the_documents_they_begin_in(tmp_path):
    """Rank 0 has windows 0, 2 and 4, rank 1 has 1 and 3."""
    by_rank = torch.tensor([0.0, 2.0, 4.0, 1.0, 3.0])
    module = SimpleNamespace(val_window_nats=SimpleNamespace(compute=lambda: by_rank))
    val = np.array([7, 7, 7, 0, 7, 7, 0, 7, 7, 7, 7])  # documents end at 3 and 6; a first target is one on
    data = SimpleNamespace(
        validated_windows=lambda: np.arange(5),
        files=SimpleNamespace(val=val, header=SimpleNamespace(end_of_text=0)),
        config=SimpleNamespace(seq_len=2),
    )
    write_windows(RunRecord(tmp_path), SimpleNamespace(is_global_zero=True, world_size=2), module, data)
    rows = (tmp_path / VAL_WINDOWS).read_text().splitlines()
    assert rows == ["window,document,nats", *(f"{w},{d},{w}.0000" for w, d in enumerate([0, 0, 1, 2, 2]))]
