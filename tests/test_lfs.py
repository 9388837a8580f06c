"""Whoever reads a large file says what a pointer is, and not what its bytes are no header of."""

import pytest

from moepp.data.files import BadRows, file_texts
from moepp.data.tokenizer import load_tokenizer
from moepp.errors import UsageError
from moepp.evaluation.local_rows import read_rows
from moepp.models.official import load_official
from moepp.training.weights import read_checkpoint

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123456789\n"
READERS = {
    "texts.jsonl": lambda path: list(file_texts([path], "", "text", BadRows(skip=True))),
    "sciq.jsonl": read_rows,
    "tokenizer.json": load_tokenizer,
    "final.ckpt": read_checkpoint,
    "model.safetensors": lambda path: load_official(path.parent),
    "pytorch_model.bin": lambda path: load_official(path.parent),
}
CONFIG = """
{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
 "num_experts": [8]}
"""


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_is_named_with_the_remedy(tmp_path, name):
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UsageError, match=rf"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        READERS[name](tmp_path / name)
