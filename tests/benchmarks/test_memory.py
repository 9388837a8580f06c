import pytest
import torch

from moepp.benchmarks.memory import counts_pages, memory_growth, peak_bytes, resident_bytes


def test_the_peak_counts_what_a_call_holds_at_once_and_frees():
    kept = []

    def call():
        first = torch.empty(2**18)  # a MiB
        second = first + 1
        del first
        kept.append(second * 2)

    assert 2 * 2**20 <= peak_bytes(call, torch.device("cpu")) < 2.1 * 2**20


def test_what_was_there_before_a_call_counts_for_nothing():
    given = torch.zeros(2**18)
    assert peak_bytes(lambda: given.add_(1).view(2, -1).mul_(2), torch.device("cpu")) == 0


def test_what_is_on_no_device_takes_no_memory():
    assert peak_bytes(lambda: torch.empty(2**20, device="meta"), torch.device("cpu")) == 0


@pytest.mark.skipif(not counts_pages(), reason="needs Linux's count of pages")
def test_a_process_grows_by_what_a_call_touches_and_not_by_what_was_freed_before():
    torch.ones(2**24)  # 64 MiB, freed
    kept = torch.ones(2**23)
    grown = resident_bytes(lambda: [torch.ones(2**23) for _ in range(3)])
    assert 95 * 2**20 <= grown < 104 * 2**20  # Linux counts pages in batches, some of them late
    assert resident_bytes(lambda: kept.mul_(2)) < 4 * 2**20


@pytest.mark.skipif(not counts_pages(), reason="this system does not tell how large a process was")
def test_growth_is_watched_from_when_it_was_asked_for():
    grown = memory_growth(torch.device("cpu"))
    most = torch.ones(2**23)  # 32 MiB
    del most
    assert 31 * 2**20 <= grown() < 40 * 2**20
