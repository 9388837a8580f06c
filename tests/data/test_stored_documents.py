import itertools

import pytest
from synthetic_corpus import texts

from moepp.data import documents
from moepp.data.corpora import Corpus
from moepp.data.settings import DataConfig


class Texts(Corpus):
    """Documents that are given, and how many of them have been asked for."""

    def __init__(self, found):
        super().__init__(DataConfig())
        self.found, self.read = found, 0

    def texts(self):
        for text in self.found:
            self.read += 1
            yield text


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 1000)
    monkeypatch.setattr(documents, "SHARD_BYTES", 3000)


def test_a_batch_is_held_and_no_more(small):
    corpus = Texts(texts(1000))
    batches = list(itertools.islice(documents._batches(corpus.texts(), 0), 3))
    longest = max(len(text.encode()) for text in texts(1000))
    assert all(1000 <= batch.size < 1000 + longest for batch in batches)
    assert corpus.read == sum(len(batch.texts) for batch in batches)


def test_shards_hold_all_documents_in_order_each_no_longer_than_asked(small, tmp_path):
    found = documents.store(Texts(texts(40)), tmp_path, progress=False)
    shards = [list(found.texts(shard, found.highest + 1, held_out=True)) for shard in range(found.shards)]
    assert found.shards > 3 and found.count == 40
    assert list(itertools.chain(*shards)) == texts(40)
    assert all(sum(len(text.encode()) for text in shard) < 3000 + 1000 + 500 for shard in shards)


def test_what_is_stored_is_not_read_again_and_half_of_it_counts_for_nothing(small, tmp_path):
    first = documents.store(Texts(texts(40)), tmp_path, progress=False)
    again = Texts(texts(40))
    assert documents.store(again, tmp_path, progress=False) == first and not again.read
    (tmp_path / documents.READ).unlink()
    assert documents.store(again, tmp_path, progress=False) == first and again.read == 40


def test_sides_are_whole_and_apart_in_every_shard(small, tmp_path):
    found = documents.store(Texts(texts(40)), tmp_path, progress=False)
    below = found.held_out_below(0.2)
    for shard in range(found.shards):
        sides = [list(found.texts(shard, below, held_out)) for held_out in (True, False)]
        assert sorted(itertools.chain(*sides)) == sorted(found.texts(shard, found.highest + 1, held_out=True))
    assert 0 < len(list(found.all_texts(below, held_out=True))) < 20
