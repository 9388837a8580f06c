import pytest

from moepp import register
from moepp.data.settings import CHOSEN_BY, READ_BY, DataConfig, refuse_unread
from moepp.errors import UsageError


def test_every_corpus_of_the_package_and_keys_of_the_schema_are_told_of():
    assert CHOSEN_BY.keys() == register.corpus.defined.keys()
    assert READ_BY.keys() <= vars(DataConfig()).keys()
    assert {reader for readers in READ_BY.values() for reader in readers} == CHOSEN_BY.keys()


@pytest.mark.parametrize(
    ("word", "corpora", "instead"),
    [
        ("data.path=x.txt", ["sotu"], "data=text data.path=x.txt"),
        ("data.path=x.txt", ["hub", "sotu"], "data=text data.path=x.txt"),
        ("data.separator=%", ["hub"], "data=text data.separator=%"),
        ("data.hub.max_documents=9", ["mixture"], "data=hub data.hub.max_documents=9"),
        ("data.sources.a.id=x", ["hub"], "data.corpus=mixture data.sources.a.id=x"),
        ("data.val_share=0.1", ["tokens"], "data=sotu data.val_share=0.1"),
    ],
)
def test_a_key_that_no_corpus_reads_is_refused(word, corpora, instead):
    key, chosen = word.partition("=")[0], ", ".join(corpora)
    with pytest.raises(UsageError) as caught:
        refuse_unread(["seed=1", word], map(DataConfig, corpora))
    assert str(caught.value) == (
        f"{word} has no effect: data.corpus={chosen} does not read {key}; leave it out, or choose a corpus that does, "
        + instead
    )


@pytest.mark.parametrize(
    ("words", "corpora"),
    [
        (["data.path=x", "data.separator=%", "data.seq_len=8"], ["text"]),
        (["data.path=x"], ["sotu", "text"]),  # an arm of a sweep reads it
        (["data.path=x", "data.hub.id=${data.path}/y"], ["hub"]),
        (["data=text", "path=x", "model.path=x", "datapath=x"], ["sotu"]),
    ],
)
def test_what_somebody_reads_is_taken(words, corpora):
    refuse_unread(words, map(DataConfig, corpora))


def test_a_corpus_of_somebody_else_may_read_everything(monkeypatch):
    config = DataConfig("text")
    config.corpus = "mine"
    refuse_unread(["data.path=x", "data.hub.id=y"], [config])
