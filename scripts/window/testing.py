"""A pytest plugin of a window's tests: why a test failed is said at once, for the log may be cut off, and what passed
in an earlier call is not run again.

    pytest -p window.testing --passed LOG
"""

from pathlib import Path

import pytest

from window.summary import ended_tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", type=Path, help="a verbose log; what it shows to have passed is left out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    passed = _passed(config)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _passed(session.config):
        session.exitstatus = pytest.ExitCode.OK  # nothing is left


def _passed(config: pytest.Config) -> set[str]:
    log = config.getoption("passed")
    ended = ended_tests(log.read_text(errors="replace")) if log is not None and log.exists() else {}
    return {test for test, outcome in ended.items() if outcome == "passed"}


class Failures:
    """Prints each failure when it is known."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            print(f"\nFAILED {report.nodeid} - {_last_line(report)}\n{report.longreprtext}", flush=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of the processes of xdist, the one that hears of all tests
        config.pluginmanager.register(Failures())


def _last_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.splitlines()[0] if crash else "see below"
