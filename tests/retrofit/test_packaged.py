"""Models that come with pip."""

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")
pytest.importorskip("glassllm", reason="needs the extra hf")

import glassllm
import transformers

from moepp.errors import UsageError
from moepp.models import packaged
from moepp.models.foreign import folder_of

TEXT = "Alice was beginning to get very tired of sitting  by her sister,\n\nand “of” having nothing to do"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "CACHE", tmp_path)
    return tmp_path


def test_glassllm_computes_what_it_did(cache):
    folder = folder_of("glassllm")
    model, tokenizer = glassllm.load_pretrained("en")
    ids = tokenizer.encode(TEXT)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours(TEXT)["input_ids"] == ids and ours.decode(ids) == TEXT
    logits = transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits
    torch.testing.assert_close(logits.detach(), torch.from_numpy(model(ids).data).float(), rtol=0, atol=2e-5)
    made = (folder / "config.json").stat().st_mtime_ns
    assert folder_of("glassllm") == folder and (folder / "config.json").stat().st_mtime_ns == made


def test_a_missing_package_is_named(cache, monkeypatch):
    monkeypatch.setitem(packaged.PACKAGED, "glassllm", ("no-such-package", None))
    with pytest.raises(UsageError, match="glassllm is in the package no-such-package: pip install"):
        folder_of("glassllm")


def test_half_of_a_folder_is_never_there(cache, monkeypatch):
    def fail(folder):
        (folder / "config.json").write_text("{}")
        raise UsageError("no")

    monkeypatch.setitem(packaged.PACKAGED, "glassllm", ("glassllm", fail))
    with pytest.raises(UsageError):
        folder_of("glassllm")
    assert list(cache.iterdir()) == []
