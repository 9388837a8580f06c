import errno
import fcntl
import os

import pytest

from moepp.data.prepare import _only_builder
from moepp.locks import locked
from moepp.tracking.mlflow_store import store_lock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_grants_none_and_stops_nobody(number, tmp_path):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    with open(tmp_path / "lock", "w") as file:
        assert locked(refuse, file, fcntl.LOCK_EX) is False


def test_a_lock_that_another_has_is_no_missing_lock(tmp_path):
    with open(tmp_path / "lock", "w") as ours, open(tmp_path / "lock", "w") as theirs:
        assert locked(fcntl.flock, theirs, fcntl.LOCK_EX) is True
        with pytest.raises(BlockingIOError):
            locked(fcntl.flock, ours, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_tokens_and_tracker_do_without_locks(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with store_lock(tmp_path), _only_builder(tmp_path / "tokens", progress=False) as alone:
        assert not alone  # so that what another builder has begun is left to it
