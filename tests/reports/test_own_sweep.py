"""Every sweep reports itself: the shipped ones, and one of one's own from its YAML file alone."""

from pathlib import Path

import pytest
from synthetic_sweep import write_sweep, write_times

from moepp.cli import main
from moepp.errors import UsageError
from moepp.records import read_json, write_json
from moepp.reports import reproduce
from moepp.shipped import SWEEPS, names
from moepp.sweeps.plan import promise
from moepp.sweeps.reading import read_sweep

OWN = """\
name: mine
question: Does my idea help?
base: [size=smoke, tracking=jsonl]
scales: {smoke: {}, laptop: {set: [size=tiny]}}
baseline: plain
arms:
  plain: [model=vanilla]
  one: [model.balance.tau=0.25]
  two: [model.balance.tau=0.5]
contrasts:
  the idea: {arms: [one, two], minus: [plain]}
trend: {x: model.balance.tau, series: {mine: [one, two]}}
notes: [Read with care.]
seeds: [0, 1]
"""
LOSSES = {"plain": {0: 3.2, 1: 3.3}, "one": {0: 3.1, 1: 3.21}, "two": {0: 3.0, 1: 3.12}}


@pytest.fixture
def own(monkeypatch, tmp_path) -> Path:
    """The file, in a folder with finished runs of the sweep."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(OWN)
    directory = Path("runs/mine-laptop")
    write_sweep(directory, LOSSES, {arm: (10.0 + i, 1.0) for i, arm in enumerate(LOSSES)})
    trials = read_json(directory / "sweep.json")["trials"]
    (directory / "sweep.json").unlink()
    sweep = read_sweep("mine.yaml")
    promise(directory, sweep, "laptop", [], [])
    write_json(directory / "sweep.json", read_json(directory / "sweep.json") | {"trials": trials})
    for trial in trials:
        config = directory / trial["path"] / "config.yaml"
        tau = {"plain": 0.75, "one": 0.25, "two": 0.5}[trial["arm"]]
        balance = f"{{form: switch, control: null, beta: 0.01, tau: {tau}}}"
        config.write_text(
            f"model: {{experts: {{ffn: 8, zero: 1, copy: 1, constant: 2}}, balance: {balance}}}\n"
            "tracking: {backend: jsonl}\n"
        )
    return directory


@pytest.mark.parametrize("what", ["mine.yaml", "runs/mine-laptop"])
def test_a_sweep_file_of_ones_own_makes_its_report_beside_the_records(own, what, capsys):
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    reproduce.report(what, "laptop")
    text, shown = (own / "report/report.md").read_text(), capsys.readouterr().out
    assert "**Does my idea help?**" in text and "Effect of the idea: -0.14" in text and "- Read with care." in text
    assert "| two | 2 | 3.0600 ± " in text and "| two | 8 + 1/1/2 |" in text and "(trend.svg)" in text
    assert ["two", "2", "3.0600"] in [
        line.split()[:3] for line in shown.splitlines()
    ] and "report: runs/mine-laptop/report" in shown
    for name in ("table.csv", "differences.svg", "speedup.png", "curves.csv", "trend.csv", "provenance.json"):
        assert (own / "report" / name).exists()
    assert {path: path.read_bytes() for path in before} == before and not Path("results").exists()


@pytest.mark.parametrize("what", ["mine.yaml", "runs/mine-laptop"])
def test_the_browser_that_a_report_names_opens_its_records(own, what, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("moepp.tracking.ui.serve", lambda *given: served.append(given[1:]))
    reproduce.report(what, "laptop")
    [hint] = [line for line in capsys.readouterr().out.splitlines() if "in the browser: " in line]
    assert main(["ui", *hint.partition(" ui ")[2].split()]) == 0
    assert served == [(Path("runs"), 5000, own)]


def test_the_command_of_a_report_names_the_file(own):
    reproduce.report("mine.yaml", "laptop")
    text = (own / "report/report.md").read_text()
    assert "Made by `python run.py reproduce mine.yaml --scale laptop`" in text


def test_what_lies_in_the_folder_stays_there(own):
    (own / "report").mkdir()
    (own / "report/notes.csv").write_text("mine")
    reproduce.report("mine.yaml", "laptop")
    assert (own / "report/notes.csv").read_text() == "mine"


def test_out_is_where_the_report_goes_instead(own, tmp_path):
    reproduce.report("mine.yaml", "laptop", out=tmp_path / "results")
    assert (tmp_path / "results/mine/laptop/report.md").exists() and not (own / "report").exists()


def test_the_end_of_a_sweep_times_its_arms_and_reports(own, monkeypatch, capsys):
    timed = []
    monkeypatch.setattr("moepp.sweeps.timing.time_arms", timed.append)
    reproduce.report_sweep("mine.yaml", own)
    assert timed == [own] and (own / "report/report.md").exists() and "minus plain" in capsys.readouterr().out


def test_an_ablation_with_its_report_is_at_most_25_lines():
    assert OWN.count("\n") <= 25


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("minus: [plain]", "minus: [plane]", "contrasts: the idea: unknown arm 'plane'.*did you mean plain"),
        ("minus: [plain]", "minus: [one]", "contrasts: the idea: needs arms, and others to take off as minus"),
        (", minus: [plain]", "", "contrasts: the idea: needs arms, and others to take off as minus"),
        ("arms: [one, two]", "arms: [one, one]", "the idea: name arms, each of them once, not one, one, plain"),
        ("mine: [one, two]}", "mine: []}", "trend: mine: name arms, each of them once, not none"),
        ("mine: [one, two]}", "mine: [one, tow]}", "trend: mine: unknown arm 'tow'"),
        ("x: model.balance.tau, ", "", "trend needs x, a key of the config, and series"),
        ("minus: [plain]", "less: [plain]", "Key 'less' not in 'Contrast'"),
        ("x: model", "y: model", "Key 'y' not in 'Trend'"),
    ],
)
def test_report_keys_that_make_no_sense_are_one_line(tmp_path, old, new, message):
    assert old in OWN
    (tmp_path / "mine.yaml").write_text(OWN.replace(old, new))
    with pytest.raises(UsageError, match=message) as error:
        read_sweep(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(error.value)


def test_an_axis_that_is_no_number_is_refused_before_anything_trains(tmp_path):
    (tmp_path / "mine.yaml").write_text(OWN.replace("x: model.balance.tau", "x: model.gate"))
    with pytest.raises(UsageError, match=r"trend.x=model.gate is released in arm one; it must be a key of the config"):
        read_sweep(str(tmp_path / "mine.yaml")).trials("smoke")


@pytest.mark.parametrize("name", [name for name in names([SWEEPS]) if read_sweep(name).space or name == "ladder"])
def test_shipped_sweeps_of_too_many_arms_to_train_report_themselves(name, unrendered, monkeypatch, tmp_path, capsys):
    """The others train theirs in tests/test_shipped.py."""
    monkeypatch.chdir(tmp_path)
    sweep, directory = read_sweep(name), Path(f"runs/{name}-laptop")
    arms = (
        sweep.arms_at("laptop")
        if not sweep.search("laptop")
        else {f"{arm}_{n:03d}": arm for arm in sweep.arms for n in range(2)}
    )
    write_sweep(directory, {arm: {0: 3.0 + 0.01 * i, 1: 3.1} for i, arm in enumerate(arms)})
    plan = read_json(directory / "sweep.json") | {
        "name": name,
        "baseline": sweep.baseline,
        "objective": "final/val_loss",
    }
    for trial in plan["trials"] if sweep.search("laptop") else ():
        trial |= {"group": arms[trial["arm"]], "point": {"optim.lr": 0.001}}
    write_json(directory / "sweep.json", plan)
    if not sweep.search("laptop"):
        write_times(directory, {arm: (10.0, 1.0) for arm in arms})
    for config in directory.glob("trials/*/config.yaml"):
        config.write_text(f"{config.read_text()}tracking: {{backend: jsonl}}\n")
    reproduce.report(name, "laptop")
    text = (directory / "report/report.md").read_text()
    assert sweep.question in text and all(contrast in text for contrast in sweep.contrasts_at("laptop"))
    assert all(note[:40] in text for note in sweep.notes) and len(capsys.readouterr().out.splitlines()) > 3
