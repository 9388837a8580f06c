"""The words of a command line, sorted by one small command."""

import gzip
import io
import os
import sys

import click
import pytest

from moepp.grammar import CommandGroup, Number, Several, Unicode, Word, run_command
from moepp.layers.bounds import Count, NotNegative
from moepp.options import DIRECTORY
from moepp.terminal import painted


@pytest.fixture
def group():
    @click.group(cls=CommandGroup)
    def commands():
        pass

    @commands.command(examples=["here --seeds 0..2"])
    @click.argument("place", required=False)
    @click.option("--seeds", type=Several(Number(Count)))
    @click.option("--note", type=Several(click.STRING))
    @click.option("--tasks-dir")
    @click.option("--share", type=Number(NotNegative), default=0.5)
    @click.option("--flag", is_flag=True)
    @click.argument("overrides", nargs=-1)
    def show(**given):
        print({name: value for name, value in given.items() if value not in (None, (), False, 0.5)})

    @commands.command()
    @click.argument("place")
    @click.option("--level", type=Word(["low", "high"]), expose_value=False)
    def bare(place):
        print(place)

    @commands.command(hidden=True)
    def sham():
        pass

    return commands


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            "here --seeds 3 4 5 a.b=6 --flag",
            {"place": "here", "seeds": [3, 4, 5], "overrides": ("a.b=6",), "flag": True},
        ),
        ("a=1 here b=2", {"place": "here", "overrides": ("a=1", "b=2")}),
        ("a=1", {"overrides": ("a=1",)}),
        ("seeds=1..3 tasks_dir=x share=2", {"seeds": [1, 2, 3], "tasks_dir": "x", "share": 2.0}),
        ("--seeds 1,7", {"seeds": [1, 7]}),
        ("--tasks-dir share=2", {"tasks_dir": "share=2"}),  # what an option takes is not looked at
        ("--note a=1", {"note": [""], "overrides": ("a=1",)}),
        ("runs/x:lr=1", {"place": "runs/x:lr=1"}),
        ("flag=true", {"overrides": ("flag=true",)}),
    ],
)
def test_every_word_finds_its_place(group, capsys, words, shown):
    assert run_command(group, ["show", *words.split()]) == 0
    assert eval(capsys.readouterr().out) == shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("show --seeds one", "Invalid value for '--seeds': 'one' is no whole number"),
        ("show --seeds -1", "Invalid value for '--seeds': -1 must be at least 1, and at most 16,777,216"),
        ("show --seeds a.b=1", "Invalid value for '--seeds': '' is no whole number"),
        ("show --share nan", "Invalid value for '--share': nan must not be negative, and finite"),
        ("show --sedes 1", "No such option '--sedes'"),
        ("bare here a=1 b=2", "unrecognized arguments: a=1 b=2"),
        ("bare", "Missing argument 'PLACE'"),
        ("shwo", "no command 'shwo'; did you mean show?"),
        ("bare here --level hihg", "Invalid value for '--level': 'hihg' is none of low, high; did you mean high?"),
        ("xyz", "no command 'xyz'; choose from show, bare\n"),
    ],
)
def test_wrong_words_end_in_one_line(group, capsys, words, message):
    assert run_command(group, words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_help_ends_with_examples_that_can_be_typed(group, capsys):
    assert run_command(group, ["show", "--help"]) == 0
    assert capsys.readouterr().out.endswith("Examples:\n  python run.py show here --seeds 0..2\n")


def test_the_installed_command_calls_itself_so(group, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/moepp"])
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    run_command(group, ["show", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("Usage: moepp show ") and "  moepp show here" in out


def test_an_interrupted_command_says_how_to_go_on(group, capsys):
    @group.command()
    def stop():
        raise KeyboardInterrupt

    assert run_command(group, ["stop"]) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command continues\n")


def test_text_in_another_encoding_is_refused(group, capsys):
    @group.command()
    @click.option("--prompt", type=Unicode())
    def say(prompt):
        print(prompt)

    assert (
        run_command(group, ["say", "--prompt", "d\u00e9j\u00e0"]) == 0 and capsys.readouterr().out == "d\u00e9j\u00e0\n"
    )
    assert run_command(group, ["say", "--prompt", os.fsdecode(b"d\xe9j")]) == 2
    assert capsys.readouterr().err == "error: Invalid value for '--prompt': 'd\\udce9j' is no UTF-8 text\n"


def test_words_come_out_of_closed_streams_and_in_every_encoding(group, monkeypatch):
    @group.command()
    def say():
        print("\u00b1 1", painted("bold", bold=True))
        print("aside", sys.stderr.isatty(), file=sys.stderr)

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command(group, ["say"]) == 0
    out.flush()
    assert out.buffer.getvalue() == b"\\xb1 1 bold\n"
    monkeypatch.setattr(sys, "stdout", None)
    assert run_command(group, ["say"]) == 0
    sys.stdout.close()
    sys.stderr.close()


def test_a_tilde_is_the_home_folder_where_no_shell_says_so(group, monkeypatch, capsys):
    @group.command()
    @click.option("--out", type=DIRECTORY)
    def write(out):
        print(out)

    monkeypatch.setenv("HOME", "/home/me")
    for words in (["--out=~/a"], ["--out", "~/a"], ["out=~/a"]):
        run_command(group, ["write", *words])
        assert capsys.readouterr().out == "/home/me/a\n"


def test_a_file_that_ends_too_early_is_no_interrupt(group, capsys):
    @group.command()
    def read():
        with gzip.open(io.BytesIO(gzip.compress(b"text")[:-4])) as file:
            file.read()

    assert run_command(group, ["read"]) == 1
    assert "error: a file ends too early: Compressed file ended before" in capsys.readouterr().err


def test_a_key_that_is_written_twice_is_refused_unless_it_says_the_same(group, capsys):
    assert run_command(group, ["show", "a.b=1", "c=1", "a.b=2"]) == 2
    assert capsys.readouterr().err == "error: a.b=1 and a.b=2 stand on one command line: give a.b once\n"
    assert run_command(group, ["show", "a.b=1", "a.b=1", "a.b.c=2", "b=3"]) == 0
