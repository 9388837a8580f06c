"""One bad line must not end a corpus, nor vanish from it without a word."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moepp.data import hub, tokenizer
from moepp.data.prepare import prepare
from moepp.data.settings import DataConfig, HubConfig
from moepp.data.tokenizer import encode, encode_text, end_of_text, load_tokenizer, train_bpe
from moepp.errors import UsageError


def lines(count=60):
    return [json.dumps({"text": f"word{i} of a document " * 8}).encode() for i in range(count)]


def corpus(tmp_path, kind, name="a.jsonl", **settings):
    """The same file, by either reader."""
    where = {"path": str(tmp_path / "in" / name)} if kind == "text" else {"hub": HubConfig(id=str(tmp_path / "in"))}
    small = {"vocab_size": 300, "seq_len": 8, "val_share": 0.3, "cache": str(tmp_path / "cache")}
    return DataConfig(corpus=kind, **where, **small, **settings)


def write(tmp_path, rows, name="a.jsonl"):
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / name).write_bytes(b"\n".join(rows) + b"\n")


BAD = {
    "null": (b'{"text": null}', r"a.jsonl line 41: has no text in 'text' .* but null"),
    "missing": (b'{"body": "x"}', r"a.jsonl line 41: has no column 'text'"),
    "byte": (b'{"text": "caf\xe9"}', r"a.jsonl line 41: byte 14 \(0xE9\) is not UTF-8"),
}


@pytest.mark.parametrize("kind", ["text", "hub"])
@pytest.mark.parametrize("bad", BAD)
def test_both_readers_refuse_a_bad_row_by_its_place_or_skip_and_count_it(tmp_path, kind, bad):
    row, message = BAD[bad]
    rows = lines()
    rows[40] = row
    write(tmp_path, rows)
    config = corpus(tmp_path, kind)
    with pytest.raises(UsageError, match=message):
        prepare(config, progress=False)
    header = prepare(replace(config, bad_rows="skip"), progress=False).header
    assert header.bad_rows == 1 and header.train.documents + header.val.documents == 59


def test_a_corpus_of_mostly_bad_rows_is_refused(tmp_path):
    write(tmp_path, [*lines(10), *[b'{"text": null}'] * 11])
    with pytest.raises(UsageError, match=r"11 of 21 documents cannot be read as text, more than the 50%"):
        prepare(corpus(tmp_path, "text", bad_rows="skip"), progress=False)
    with pytest.raises(UsageError, match=r"21 of 21 documents cannot be read as text, .* check data.path, data.text_c"):
        prepare(corpus(tmp_path, "text", bad_rows="skip", text_column="body"), progress=False)


def test_other_columns_may_differ_between_files_of_a_folder(tmp_path):
    write(tmp_path, [json.dumps({"text": f"one {i} " * 20, "meta": 3}).encode() for i in range(20)])
    other = [json.dumps({"text": f"two {i} " * 20, "meta": "x", "b": {}}).encode() for i in range(20)]
    write(tmp_path, other, "b.jsonl")
    header = prepare(corpus(tmp_path, "hub"), progress=False).header
    assert header.train.documents + header.val.documents == 40


def test_a_note_beside_the_data_is_no_other_corpus(tmp_path):
    write(tmp_path, lines())
    before = prepare(corpus(tmp_path, "hub"), progress=False).header.digest
    (tmp_path / "in/NOTES.md").write_text("downloaded on Monday\n")
    assert prepare(corpus(tmp_path, "hub"), progress=False).header.digest == before


@pytest.mark.parametrize("pattern", ["<|endoftext|>", "<|eot|>\n"])
def test_a_separator_in_which_bars_are_meant_is_refused_with_what_to_write(tmp_path, pattern):
    write(tmp_path, [b"<|endoftext|>".join(b"a < b %d " % i * 9 for i in range(40))], "a.txt")
    with pytest.raises(UsageError, match=r"for the text itself write <\\\|e"):
        prepare(corpus(tmp_path, "text", "a.txt", separator=pattern), progress=False)
    header = prepare(corpus(tmp_path, "text", "a.txt", separator=r"<\|endoftext\|>"), progress=False).header
    assert header.train.documents + header.val.documents == 40


def test_tokens_that_lie_in_the_cache_need_no_network(tmp_path, monkeypatch, capsys):
    config = DataConfig(
        corpus="hub", hub=HubConfig(id="someone/corpus"), vocab_size=300, seq_len=8, val_share=0.3, cache=str(tmp_path)
    )
    with monkeypatch.context() as online:
        online.setattr(hub, "_look_up", lambda hub: "a" * 40)
        online.setattr(hub, "_row_texts", lambda *_: iter([f"word{i} " * 80 for i in range(60)]))
        made = prepare(config, progress=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert prepare(config, progress=False).path == made.path
    assert "someone/corpus: the hub cannot be asked" in capsys.readouterr().err
    with pytest.raises(UsageError, match="cannot look up 'someone/other'"):
        prepare(replace(config, hub=HubConfig(id="someone/other")), progress=False)


@pytest.mark.parametrize(("status", "goes_on"), [(None, True), (503, True), (401, False), (404, False)])
def test_a_dataset_that_the_hub_denies_is_not_taken_from_memory(tmp_path, monkeypatch, status, goes_on):
    error = OSError("no")
    error.response = SimpleNamespace(status_code=status)
    monkeypatch.setattr(hub, "_look_up", lambda hub: "a" * 40)
    assert hub.commit(HubConfig(id="someone/corpus"), tmp_path) == "a" * 40

    def refuse(*_, **__):
        raise error

    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    if goes_on:
        assert hub.commit(HubConfig(id="someone/corpus"), tmp_path) == "a" * 40
    else:
        with pytest.raises(UsageError, match="cannot look up 'someone/corpus'"):
            hub.commit(HubConfig(id="someone/corpus"), tmp_path)


def test_a_long_document_is_tokenised_in_pieces_as_it_would_be_whole(monkeypatch):
    text = "x y of  many words\n\nand more " * 40
    bpe = train_bpe([text], 300)
    ((_, whole),) = encode(bpe, [text])
    monkeypatch.setattr(tokenizer, "WHOLE", 200)
    monkeypatch.setattr(tokenizer, "PIECE", 100)
    _, (_, cut) = encode(bpe, ["short", text])
    assert list(cut.ids) == whole.ids and [tuple(pair) for pair in cut.offsets] == whole.offsets
    assert "".join(tokenizer.pieces("x" * 1000)) == "x" * 1000


def published(special, template=None):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(["alpha beta"] * 9, trainer)
    if template:
        tokens = [(token, made.token_to_id(token)) for token in special]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return made


def test_one_encoder_adds_nothing_and_takes_special_names_for_text():
    made = published(["<s>", "</s>"], "<s> $A </s>")
    assert encode_text(made, "") == []
    ids = encode_text(made, "alpha</s> beta")
    assert not {0, 1} & set(ids) and made.decode(ids) == "alpha</s> beta"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": {"content": "<fin>"}}),
        ("config.json", {"eos_token_id": 1}),
        ("generation_config.json", {"eos_token_id": [1, 0]}),
    ],
)
def test_the_end_of_text_is_read_where_its_name_is_not_known(tmp_path, name, content):
    published(["<begin>", "<fin>"]).save(str(tmp_path / "tokenizer.json"))
    made = load_tokenizer(tmp_path / "tokenizer.json")
    assert end_of_text(made, name="<fin>") == 1
    with pytest.raises(UsageError, match=r"set data\.end_of_text"):
        end_of_text(made, tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert end_of_text(made, tmp_path) == 1


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    write(tmp_path, lines())
    vocab = {"[UNK]": 0, "</s>": 1, "of": 2, "document": 3}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"tokenizer.json loses 40\.5% of the held-out text .*more than 1%"):
        prepare(corpus(tmp_path, "text", tokenizer=str(tmp_path / "tokenizer.json")), progress=False)
