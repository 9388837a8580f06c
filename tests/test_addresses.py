import json
import stat

import pytest

from moepp.addresses import without_user
from moepp.config import save
from moepp.errors import RunError, UsageError
from moepp.records import write_json, write_text
from moepp.sweeps.launchers.call import SweepCall
from moepp.tracking.mlflow_store import store_uri
from moepp.tracking.settings import TrackingConfig
from moepp.training.settings import RunConfig

SECRET = "postgresql://me:hunter2@db:5432/mlflow"
PUBLIC = "postgresql://db:5432/mlflow"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (SECRET, PUBLIC),
        ("https://TOKEN@host/x", "https://host/x"),
        ("mysql+pymysql://u:p@ss@host/x", "mysql+pymysql://host/x"),
        ("mysql://u:p/a#?ss@host/x", "mysql://host/x"),
        ("postgresql://h/x?user=me&password=hunter2", "postgresql://h/x?user=***&password=***"),
        (
            "https://h/x?a=1&X-Amz-Signature=s&sig=s#access_token=t",
            "https://h/x?a=1&X-Amz-Signature=***&sig=***#access_token=***",
        ),
        ("https://h/x?client_secret=s&api-key=k&monkey=1", "https://h/x?client_secret=***&api-key=***&monkey=1"),
        ("http://host:5000/a@b and me@x.org", "http://host:5000/a@b and me@x.org"),
        ('{"a": "http://host:5000", "b": "me@x.org"}', '{"a": "http://host:5000", "b": "me@x.org"}'),
        (f"see {SECRET}, or {SECRET}", f"see {PUBLIC}, or {PUBLIC}"),
    ],
)
def test_addresses_lose_their_users_and_nothing_else(text, left):
    assert without_user(text) == left


def test_no_error_and_no_record_names_a_password(tmp_path):
    for kind in (UsageError, RunError):
        assert "hunter2" not in str(kind(f"cannot reach {SECRET}"))
    save(RunConfig(tracking=TrackingConfig(uri=SECRET)), tmp_path / "config.yaml")
    write_json(tmp_path / "provenance.json", {"command": f"run.py train tracking.uri={SECRET}"})
    for path in tmp_path.iterdir():
        assert "hunter2" not in path.read_text() and PUBLIC in path.read_text()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_text(tmp_path / "a.json", json.dumps({"logger_options": {"api_key": "x"}}))
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o600


def test_a_record_finds_its_tracker_again_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    assert store_uri(TrackingConfig(uri=PUBLIC), tmp_path) == SECRET
    assert store_uri(TrackingConfig(uri="postgresql://other/mlflow"), tmp_path) == "postgresql://other/mlflow"


def test_a_worker_is_told_the_password_by_its_environment_alone():
    call = SweepCall("tau", "smoke", overrides=[f"tracking.uri={SECRET}", "optim.lr=1e-3"])
    assert f"tracking.uri={PUBLIC}" in call.work() and "optim.lr=1e-3" in call.work()
    assert call.environment() == {"MLFLOW_TRACKING_URI": SECRET}
    assert SweepCall("tau", "smoke", overrides=[f"tracking.uri={PUBLIC}"]).environment() == {}


def test_configs_do_not_read_the_environment():
    from moepp.config import compose

    with pytest.raises(UsageError, match=r"oc\.env"):
        compose(RunConfig, ["tags.note=${oc.env:HOME}"])
