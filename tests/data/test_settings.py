import pytest
from registered import forgotten

from moepp import register
from moepp.data.settings import CHOSEN_BY, PREPARING, DataConfig, refuse_unread
from moepp.errors import UsageError


def test_every_corpus_of_the_package_and_keys_of_the_schema_are_told_of():
    assert CHOSEN_BY.keys() == register.corpus.defined.keys()
    assert {*PREPARING, *register.corpus.KEYS} <= vars(DataConfig()).keys()
    said = {name: register.corpus.reads(name) for name in CHOSEN_BY}
    assert all(said.values()) and {key for keys in said.values() for key in keys} == {*register.corpus.KEYS}


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


def mine(config):
    yield config.path


def test_a_corpus_of_somebody_else_may_read_everything_unless_it_says_what():
    with forgotten():
        register.corpus("mine")(mine)
        refuse_unread(["data.path=x", "data.hub.id=y"], [DataConfig("mine")])
        register.corpus("mine", reads=["path"])(mine)
        refuse_unread(["data.path=x", "data.val_share=0.1", "data.seq_len=8"], [DataConfig("mine")])
        for word in ("data.hub.id=y", "data.separator=%", "data.bad_rows=skip"):
            with pytest.raises(UsageError, match=rf"^{word} has no effect: data\.corpus=mine does not read"):
                refuse_unread([word], [DataConfig("mine")])
        refuse_unread(["data.separator=%"], [DataConfig("mine"), DataConfig("text")])
        register.corpus("mine", reads=[])(mine)
        with pytest.raises(UsageError, match=r"^data\.path=x has no effect: .* data=text data\.path=x$"):
            refuse_unread(["data.path=x"], [DataConfig("mine")])


def test_a_corpus_reads_only_what_corpora_can_read():
    with pytest.raises(ValueError, match=r"^corpus 'mine': reads=seq_len: choose from path, separator, "):
        register.corpus("mine", reads=["path", "seq_len"])
