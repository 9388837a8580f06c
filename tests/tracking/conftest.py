import pytest
from mirrored import make_record


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder of runs for all tests: each new SQLite store costs a second."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def no_tracker_of_the_machine(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def record(runs, request):
    return make_record(runs / request.node.name / "0123abcd")
