"""What data can be told: where text comes from, how it becomes batches. Read without torch, as layers/settings.py."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from moepp import register
from moepp.errors import UsageError
from moepp.layers.bounds import Bounded, Count, Positive, Range, Seed, Whole


@dataclass
class HubConfig:
    """A dataset of the Hugging Face hub, or a local folder in one of the forms that `datasets.load_dataset` reads."""

    id: str = ""  # "HuggingFaceFW/fineweb-edu", or a folder
    config: str = ""  # the dataset's configuration, such as "sample-10BT"; "" is its default
    split: str = "train"  # the dataset's split that is read
    revision: str = "main"  # branch, tag or commit; a full commit hash needs no look-up
    streaming: bool = False  # read only what max_documents asks for instead of downloading the whole dataset
    max_documents: Annotated[int, Range(0)] = 0  # the first so many; 0 takes all


@dataclass
class SourceConfig(HubConfig):
    """One part of a mixture."""

    share: Positive = 1.0  # of the text in UTF-8 bytes; shares need not sum to 1
    text_column: str = "text"  # the field that holds the text


@dataclass
class DataConfig(Bounded, key="data"):
    """Where the text comes from, how it becomes tokens, and how tokens become batches."""

    corpus: str = "sotu"  # sotu, text, hub, mixture, tokens, or a registered one
    corpus_options: dict[str, Any] = field(default_factory=dict)  # of a registered corpus
    # text: files or globs, JSONL, CSV and compressed ones too; tokens: a prepared folder; mixture: the folder that its
    # preset finds its sources in
    path: str | list[str] = ""
    # text: regex between documents of a file, as `\n\s*\n`; "" makes each file one document. | separates alternatives:
    # for the text <|endoftext|> write `<\|endoftext\|>`
    separator: str = ""
    text_column: str = "text"  # hub, JSONL and CSV files: the field that holds the text
    bad_rows: Literal["refuse", "skip"] = "refuse"  # rows without text, bytes that are not UTF-8
    hub: HubConfig = field(default_factory=HubConfig)
    # of a mixture, by name; it ends with the first that ends
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: str = "bpe"  # byte-level BPE trained on the training split, or the path of a tokenizer.json
    end_of_text: str = ""  # the token of that tokenizer.json that ends a document; "": as it says
    vocab_size: Count = 4096  # ids the model has room for; the size of a trained BPE
    val_share: Annotated[float, Range(above=0, below=1)] = 0.05  # of the documents, held out by a hash of their content
    split_seed: Seed = 0  # of that hash
    seq_len: Count = 128  # predicted tokens per sequence
    batch_size: Count = 16  # sequences per optimizer step, over all devices and micro-batches
    # of the windows in an epoch: a permutation in memory, 8 bytes a window in every process, or one that a key computes
    order: Literal["permuted", "keyed"] = "permuted"
    val_sequences: Whole = 256  # held-out sequences per validation, evenly spread; 0 takes all
    final_val_sequences: Whole | None = None  # after the last step; null: as all others, 0: all there are
    cache: str = ".cache"  # folder of prepared tokens
    workers: Annotated[int, Range(0, 1024)] = 0  # data-loading processes per device
    digest: str = ""  # of the tokens, once a run is frozen: a changed corpus is then refused

    def __post_init__(self) -> None:
        super().__post_init__()
        register.corpus.check(self.corpus, self.corpus_options)


CHOSEN_BY = {
    "sotu": "data=sotu", "text": "data=text", "hub": "data=hub", "mixture": "data.corpus=mixture",
    "tokens": "data=tokens",
}  # fmt: skip
PREPARING = ("tokenizer", "end_of_text", "val_share", "split_seed")  # read where text becomes tokens


def refuse_unread(words: Iterable[str], configs: Iterable[DataConfig]) -> None:
    """Raises UsageError for `data.key=value` among a command's words where no corpus that it makes or opens reads it. A
    registered corpus that does not say what it reads may read everything. Of presets, sweep files and records nothing
    is refused: what they say is for the corpus that they choose, if the command chooses no other.
    """
    words, corpora = list(words), {config.corpus for config in configs}
    for word in words:
        key = word.partition("=")[0]
        section, _, inside = key.partition(".")
        name = inside.partition(".")[0]
        referred_to = any(f"${{{key}}}" in other for other in words)
        if section == "data" and not referred_to and not any(_reads(corpus, name) for corpus in corpora):
            reader = next(corpus for corpus in CHOSEN_BY if _reads(corpus, name))
            raise UsageError(
                f"{word} has no effect: data.corpus={', '.join(sorted(corpora))} does not read {key}; leave it out, or"
                f" choose a corpus that does, {CHOSEN_BY[reader]} {word}"
            )


def _reads(corpus: str, name: str) -> bool:
    """Whether a key of `data` has an effect with the corpus."""
    if name in PREPARING:
        return corpus != "tokens"  # which are there already
    said = register.corpus.reads(corpus)
    return name not in register.corpus.KEYS or said is None or name in said
