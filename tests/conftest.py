import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch

from moepp.data.token_files import FORMAT, Counts, Header

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by whichever test or library
torch.set_num_threads(1)  # the models are tiny, and other processes may want the cores
os.fsync = lambda descriptor: None  # what tests write need not outlive a loss of power, and a disk takes its time


def pytest_configure(config):
    """Several workers take the files in their order: xdist would begin with those of most tests, and end with long ones
    of a single test, while other workers have nothing left.
    """
    config.option.loadscopereorder = False


def pytest_make_parametrize_id(val, argname):
    """Bytes do not name a test: what a compressor writes, the time for one, differs from worker to worker, and xdist
    runs nothing where two collect other names.
    """
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def one_thread():
    """What times a sweep's arms takes all cores and keeps them, and threads that wait for each other on busy cores need
    minutes.
    """
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory):
    """Prepared tokens with something to learn: id + 1 follows id three times in four, over 64 ids; each id is one byte,
    id 0 none.
    """
    folder = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(0)
    steps = np.where(generator.random(24_000) < 0.75, 1, generator.integers(0, 64, 24_000))
    ids = (steps.cumsum() % 64).astype("<u2")
    train, val = ids[:20_000], ids[20_000:]
    train.tofile(folder / "train.bin")
    val.tofile(folder / "val.bin")
    (val != 0).astype("<u4").tofile(folder / "val.lengths.bin")
    counts = [Counts(1, len(split), int((split != 0).sum())) for split in (train, val)]
    header = Header(FORMAT, "feedfacefeedface", "<u2", 64, 0, "a counting chain", *counts)
    (folder / "header.json").write_text(json.dumps(asdict(header)))
    return folder


@pytest.fixture
def overrides(token_folder, tmp_path):
    """A run of 12 steps that takes a fraction of a second, with its records in a folder of the test's own."""
    return [
        "size=smoke", "tracking=jsonl", "data=tokens", f"data.path={token_folder}", f"runs={tmp_path / 'runs'}",
        "trainer.progress=false", "trainer.steps=12", "trainer.val_every=5", "trainer.checkpoint_every=4",
        "trainer.log_every=2", "trainer.expert_timing=false", "trainer.accelerator=cpu",
        "trainer.threads=1",
    ]  # fmt: skip


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are drawn, but not written by Matplotlib, which takes most of a report's time: see test_figures.py."""
    from moepp.reports import report
    from moepp.statistics.style import styled

    def save_figure(figure, folder):
        with styled():
            figure.draw()
        files = [folder / f"{figure.data.name}{suffix}" for suffix in (".svg", ".png")]
        for file in files:
            file.write_text("<svg/>")
        return files

    monkeypatch.setattr(report, "save_figure", save_figure)
