import sys
import time

import click
import pytest

from moepp import terminal


class Screen:
    """Standard error that is a terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_wide_command_has_no_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "71")
    assert terminal.width() == 71
    with click.Context(click.Command("x")) as context:
        assert terminal.width() == 71
        context.meta[terminal.WIDE] = True
        assert terminal.width() is None
    assert terminal.width() == 71


@pytest.mark.parametrize(("environment", "shown"), [({}, "\x1b[31mno\x1b[0m"), ({"NO_COLOR": "1"}, "no")])
def test_only_a_terminal_that_wants_them_gets_colours(monkeypatch, capsys, environment, shown):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert terminal.painted("no", Screen(), fg="red") == shown
    assert terminal.painted("no", fg="red") == "no"


def test_what_takes_long_is_said_and_wiped_from_a_terminal(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(terminal, "FIRST_WORD", 0.01)
    with terminal.working("counting"):
        while "s" not in screen.text:
            time.sleep(0.01)
    assert screen.text.startswith("\rcounting: 0 s") and screen.text.endswith("\r\x1b[K")


def test_what_is_quick_is_not_mentioned(capsys):
    with terminal.working("counting"):
        pass
    assert capsys.readouterr().err == ""


def test_a_log_gets_whole_lines(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "LOG_WORD", 0.01)
    with terminal.working("counting"):
        time.sleep(0.1)
    assert capsys.readouterr().err == "counting: 0 s\n"
