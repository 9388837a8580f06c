"""Tables on a terminal: never wider than it, unless all of it was asked for."""

import click
import pytest

from moepp.statistics.tables import Table, as_csv, as_lines, on_terminal
from moepp.terminal import WIDE

TABLE = Table(
    "", "", ("arm", "loss", "minus vanilla", "speed-up"), (("vanilla", 4.713, None, 1.0), ("zero", 4.7, "-0.1", 2))
)


@pytest.mark.parametrize(
    ("columns", "head", "left_out"),
    [
        (80, "arm       loss  minus vanilla  speed-up", 0),
        (30, "arm       loss  minus vanilla", 1),
        (12, "arm       loss", 2),
    ],
)
def test_columns_that_do_not_fit_are_left_out_and_counted(monkeypatch, columns, head, left_out):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = as_lines(TABLE)
    assert lines[0] == head and lines[1].split() == ["vanilla", "4.713", "–", "1"][: 4 - left_out]
    assert lines[3:] == ([f"{4 - left_out} of 4 columns; --wide shows all"] if left_out else [])


def test_wide_shows_all(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    with click.Context(click.Command("x")) as context:
        context.meta[WIDE] = True
        assert as_lines(TABLE)[0] == "arm       loss  minus vanilla  speed-up"


def test_markdown_is_shown_alike(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = ["Before.", "", "| arm | loss |", "|---|---:|", "| zero | 4.7 |", "", "After."]
    assert list(on_terminal(lines)) == ["Before.", "", "arm   loss", "zero   4.7", "", "After."]


def test_a_saved_table_has_seven_digits_and_whole_numbers_whole():
    cells = ("a", 3.1415926535, -1.23456789e-9, 123456789.0, 123456789, 0.1, None, 1234567.891)
    table = Table("t", "", ("arm", *"bcdefgh"), (cells,))
    assert as_csv(table).splitlines()[1] == "a,3.141593,-1.234568e-09,123456789.0,123456789,0.1,,1234568.0"
