from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from moepp.training.ranks.meeting import name_of_attempt


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)


def names(store, ranks, world_size):
    """Of ranks whose agents have counted as many restarts as their numbers say."""

    def name(rank):
        return name_of_attempt(store.clone(), rank, world_size, f"{rank}", 20.0)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(name, ranks))


def test_all_ranks_of_an_attempt_agree_and_no_two_attempts_do(store):
    first, second = names(store, range(3), 3), names(store, [2, 1, 0], 3)
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
    assert first[0].startswith("0/") and second[0].startswith("0/")


def test_ranks_that_died_before_they_met_are_not_taken_for_those_of_now(store):
    for rank in (1, 2):
        store.set(f"asks/{rank}", "word of a dead rank")
    assert len(set(names(store, [0, 1, 2], 3))) == 1


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_asked(store):
    with pytest.raises(dist.DistStoreError, match=r"1 of 3 ranks have come within 0\.2 s"):
        name_of_attempt(store, 0, 3, "1", 0.2)


def test_one_rank_alone_waits_for_nobody(store):
    assert name_of_attempt(store, 0, 1, "2", 0.0).startswith("2/")
