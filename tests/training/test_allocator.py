import ctypes

import pytest

from moepp.training import allocator


@pytest.fixture(autouse=True)
def nothing_preloaded(monkeypatch):
    monkeypatch.setattr(allocator, "_kept", False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)


class Libc:
    def __init__(self):
        self.asked = []

    def mallopt(self, name, value):
        self.asked.append((name, value))
        return 1


@pytest.mark.parametrize(("library", "kept"), [("glibc", "keeps freed memory"), ("", None)])
def test_glibc_alone_is_told_to_keep_memory_and_provenance_says_so(monkeypatch, library, kept):
    libc = Libc()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: (library, "2.39"))
    allocator.keep_freed_memory()
    assert libc.asked == ([(-4, 0), (-1, -1)] if kept else [])
    assert allocator.allocator() == kept


def test_a_preloaded_library_is_named(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
    assert allocator.allocator() == "libjemalloc.so.2"
