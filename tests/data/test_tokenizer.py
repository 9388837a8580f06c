import random
import re

import numpy as np
import pytest
from synthetic_corpus import texts
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moepp.data import tokenizer as tokenizer_module
from moepp.data.tokenizer import (
    LLAMA3,
    encode,
    end_of_text,
    ids_of,
    load_tokenizer,
    splits_as_known,
    token_bytes,
    train_bpe,
)  # fmt: skip
from moepp.errors import UsageError

HARD = ["naïve café 🙂🙂 東京\n\n  two  spaces \t", "plain ASCII", "\u0000\ufeff e\u0301", " leading and trailing "]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(texts(20), 320)


def metaspace_tokenizer():
    """Unlike the byte-level BPE wherever counting could go wrong: drops characters, rewrites text, adds a space."""
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in "abcdefghijklmnoprstu")], 0)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Strip(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def test_every_text_decodes_exactly(bpe):
    for text, encoding in encode(bpe, HARD):
        assert bpe.decode(encoding.ids) == text


def test_training_twice_gives_the_same_tokenizer(bpe):
    assert train_bpe(texts(20), 320).to_str() == bpe.to_str()
    assert end_of_text(bpe) == 0
    assert bpe.get_vocab_size() == 320


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(UsageError, match="above 256, not 256"):
        train_bpe(texts(2), 256)


@pytest.mark.parametrize("make", [lambda: train_bpe(texts(20), 300), metaspace_tokenizer])
def test_bytes_of_tokens_sum_to_the_bytes_of_the_text(make):
    encoded = list(encode(make(), HARD + texts(5)))
    assert len(encoded) == len(HARD) + 5
    for text, encoding in encoded:
        lengths = token_bytes(text, encoding.offsets)
        assert len(lengths) == len(encoding.ids)
        assert lengths.sum() == len(text.encode())
        assert lengths.min() >= 0


def test_bytes_of_a_character_spread_over_tokens_count_once():
    tokenizer = train_bpe(["aaaa"], 257)  # bytes only
    ((text, encoding),) = encode(tokenizer, ["a🙂b"])
    assert token_bytes(text, encoding.offsets).tolist() == [1, 4, 0, 0, 0, 1]


def test_the_name_of_a_special_token_in_a_text_is_text(bpe):
    ((_, encoding),) = encode(bpe, ["an <|endoftext|> in the middle"])
    assert end_of_text(bpe) not in encoding.ids
    assert bpe.decode(encoding.ids) == "an <|endoftext|> in the middle"


def test_texts_without_a_token_are_left_out():
    assert [text for text, _ in encode(metaspace_tokenizer(), ["abc", "\n \n", "cab"])] == ["abc", "cab"]


def test_order_is_kept_over_batches(bpe, monkeypatch):
    monkeypatch.setattr("moepp.data.tokenizer.BATCH", 500)
    assert [text for text, _ in encode(bpe, iter(texts(20)))] == texts(20)


def test_a_published_tokenizer_does_not_truncate_or_pad(bpe, tmp_path):
    bpe = Tokenizer.from_str(bpe.to_str())
    bpe.enable_truncation(4)
    bpe.enable_padding(length=4)
    bpe.save(str(tmp_path / "tokenizer.json"))
    ((_, encoding),) = encode(load_tokenizer(tmp_path / "tokenizer.json"), [texts(1)[0]])
    assert len(encoding.ids) > 4


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is no readable tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["ab ab"], trainers.BpeTrainer(show_progress=False))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"set data\.end_of_text to the token that ends a document"):
        end_of_text(load_tokenizer(tmp_path / "tokenizer.json"))


def test_a_token_of_ordinary_text_ends_no_document(bpe):
    for word in sorted(bpe.get_vocab().keys() - {"<|endoftext|>"}):  # some begin with a space, some end in a character
        with pytest.raises(UsageError, match=rf"^data\.end_of_text={re.escape(word)} is a token of ordinary text"):
            end_of_text(bpe, name=word)
    assert end_of_text(bpe, name="<|endoftext|>") == 0


def test_offsets_that_go_back_never_count_text_twice():
    lengths = token_bytes("abcdé", [(0, 3), (1, 2), (3, 4)])
    assert np.array_equal(lengths, [3, 0, 3])


def split_by(pattern, **settings):
    """A byte-level tokenizer whose words a pattern of its own splits, as published ones have it."""
    tokenizer = Tokenizer.from_str(train_bpe(texts(20), 320).to_str())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    normalized = settings.get("normalized", False)
    tokenizer.add_tokens([AddedToken(text, normalized=normalized, lstrip=True) for text in ("<a b>", "expert")])
    tokenizer.normalizer = normalizers.NFC() if settings.get("nfc") else None
    return tokenizer


def with_prefix_space(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


BY_WORDS = {
    "ours": lambda: train_bpe(texts(20), 320),
    "llama": lambda: split_by(LLAMA3.format("{1,3}")),
    "qwen": lambda: split_by(LLAMA3.format(""), nfc=True),
}
OTHERWISE = {
    "sentencepiece": metaspace_tokenizer,
    "another pattern": lambda: split_by(r"\w+ \w+|."),
    "added tokens in normalised text": lambda: split_by(LLAMA3.format(""), nfc=True, normalized=True),
    "a space before the text": lambda: with_prefix_space(train_bpe(texts(20), 320)),
}


def drawn_texts(count=300):
    """Words, spaces of all kinds, marks and digits in any order."""
    generator = random.Random(1)
    parts = [
        *"aZ9é東🙂'.,-\"\u0301\u200b\x1c\x85",
        "'s",
        "'LL",
        "router",
        "expert",
        "1234",
        "\r\n",
        "\n",
        "\t",
        "\u00a0",
        "\u3000",
    ]
    return ["".join(generator.choices([*parts, *[" "] * 8], k=generator.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("name", [*BY_WORDS, *OTHERWISE])
def test_ids_of_words_are_those_of_the_text(name):
    """To every id, whatever stands beside a space; tokenizers of which that is not known are not cut."""
    tokenizer = {**BY_WORDS, **OTHERWISE}[name]()
    assert splits_as_known(tokenizer) == (name in BY_WORDS)
    documents = [*HARD, *texts(3), *drawn_texts()]
    found = list(ids_of(tokenizer, "<u4")(documents))
    expected = [(text, list(encoding.ids)) for text, encoding in encode(tokenizer, documents)]
    assert [(text, np.frombuffer(ids, "<u4").tolist()) for text, ids in found] == expected


def test_a_word_is_tokenised_once_and_long_or_late_ones_are_not_kept(bpe, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "WORDS", 3)
    words = tokenizer_module.WordIds(bpe, "<u2")
    list(words.of_texts(["the router the router", "x" * 65 + " copy", "zero the"]))
    assert list(words) == ["the", " router", " the"]
