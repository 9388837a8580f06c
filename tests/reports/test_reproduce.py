from dataclasses import replace
from pathlib import Path

import pytest
from reports.synthetic_sweep import write_sweep

from moepp.errors import UsageError
from moepp.experiments import discover
from moepp.records import read_json, write_json
from moepp.reports import reproduce, rerun
from moepp.reports.experiment import Experiment, Findings, Runs
from moepp.statistics.claims import Claim
from moepp.statistics.tables import Table


@pytest.fixture
def seen():
    return []


@pytest.fixture
def study(monkeypatch, tmp_path, seen):
    """A study that needs one arm of a sweep, in an empty working directory."""

    def measure(context):
        seen.append(context)
        directories = context.run_directories("gating_residual", "vanilla").values() if context.directories else []
        return Findings((Table("runs", "Runs.", ("run",), tuple((path.name,) for path in directories)),))

    found = Experiment(
        "demo", "A demo", "Is it so?", measure, "it is.", runs=(Runs("gating_residual", arms=("vanilla",)),),
        options={"pos": "a file"}, scales=("smoke", "laptop"),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found_here(monkeypatch, demo=found, alone=replace(found, name="alone", runs=()))
    return found


def found_here(monkeypatch, **experiments):
    for module in (reproduce, rerun):
        monkeypatch.setattr(module, "discover", lambda: experiments)


def test_a_study_trains_the_arms_it_needs_and_takes_its_own_options(study, seen, monkeypatch, tmp_path, capsys):
    asked = []

    def run_sweep(sweep, *arguments, minutes):
        asked.extend([set(sweep.arms), *arguments])
        directory = write_sweep(tmp_path / "here/gating_residual-smoke", {"vanilla": {3: 3.0}})
        called = {"name": "gating_residual", "overrides": ["runs=here"], "file_seeds": [0]}
        write_json(directory / "sweep.json", read_json(directory / "sweep.json") | called)
        return directory.relative_to(tmp_path)

    monkeypatch.setattr("moepp.sweeps.runner.run_sweep", run_sweep)
    with pytest.raises(UsageError, match=r"pos=my words\.jsonl: there is no such file"):
        reproduce.reproduce("demo", "smoke", 1, ["pos=my words.jsonl"])
    (tmp_path / "my words.jsonl").touch()
    reproduce.reproduce("demo", "smoke", 1, ["pos=my words.jsonl", "runs=here"], seeds=[3])
    assert asked == [{"vanilla"}, "smoke", 1, ["runs=here"], [3]]
    [context] = seen
    assert context.scale == "smoke" and context.options == {"pos": "my words.jsonl"}
    assert list(context.run_directories("gating_residual", "vanilla")) == [3]
    report = (tmp_path / "here/gating_residual-smoke/report/demo/report.md").read_text()
    assert "Made by `python run.py reproduce demo --scale smoke --seeds 3 'pos=my words.jsonl' runs=here`" in report
    assert "report: here/gating_residual-smoke/report/demo/report.md" in capsys.readouterr().out


def test_what_a_study_found_goes_onto_the_parents_of_the_sweeps_it_read(study, monkeypatch, tmp_path):
    directory = write_sweep(tmp_path / "sweep", {"vanilla": {3: 3.0}})
    config = next(directory.glob("**/config.yaml"))
    config.write_text(
        config.read_text() + "tracking: {backend: mlflow, uri: 'http://tracker:5000', experiment: mine}\n"
    )
    claims = (Claim("it is so", "holds"),)
    measured = replace(study, measure=lambda context: replace(study.measure(context), claims=claims))
    found_here(monkeypatch, demo=measured)
    monkeypatch.setattr("moepp.sweeps.runner.run_sweep", lambda *_, **__: directory)
    logged = []
    monkeypatch.setattr("moepp.tracking.mirror.log_report", lambda *report: logged.append(report))
    reproduce.reproduce("demo", "smoke", seeds=[3])
    [(parent, tracking, runs, name, _, files, note)] = logged
    assert (parent, runs, name, tracking.experiment) == (directory, directory.parent, "demo", "mine")
    assert {"report.md", "runs.csv"} <= {file.name for file in files}
    assert note.startswith("**Is it so?**") and "- **holds**: it is so." in note and "`demo/report.md`" in note


def test_a_checkpoint_takes_the_place_of_the_runs_a_study_needs(study, seen, monkeypatch):
    found_here(monkeypatch, demo=replace(study, options={"weights": "a folder"}))
    Path("here").mkdir()
    reproduce.reproduce("demo", "smoke", arguments=["weights=here"])  # would train the sweep otherwise
    assert seen[0].directories == {} and seen[0].options == {"weights": "here"}
    with pytest.raises(UsageError, match=r"runs=there is of trained runs, and weights= takes their place"):
        reproduce.reproduce("demo", "smoke", arguments=["weights=here", "runs=there"])


def test_flags_are_options_too(study, seen, monkeypatch):
    found_here(monkeypatch, demo=replace(study, runs=(), options={"tasks_dir": "data"}))
    Path("here").mkdir()
    reproduce.reproduce("demo", "smoke", flags={"tasks_dir": "here"})
    assert seen[0].options == {"tasks_dir": "here"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("alone", "smoke", 0, ["poss=x"]), r"alone knows no poss=x; it takes pos= \(a file\)"),
        (("demo", "smoke", 0, [], None, {"tasks_dir": "x"}), "demo knows no tasks_dir"),
        (("demo", "paper"), "demo has no scale 'paper'; choose from smoke, laptop"),
        (("seen", "smoke"), "seen holds no sweep.json, as the folder of a sweep's records does"),
        (("no/where", "smoke"), "there is no file and no folder no/where"),
        (("studies", "smoke", 0, ["limit=1"]), "limit=1 must be a whole number of at least 2"),
        (("studies", "smoke", 0, ["weights=none"]), "weights=none: there is no such file or folder"),
        (("dem", "smoke"), "no experiment and no sweep 'dem'; choose from demo, alone, .*; did you mean demo?"),
    ],
)
def test_what_a_study_cannot_use_is_refused(study, seen, monkeypatch, call, message):
    studies = replace(study, options={"limit": "examples", "weights": "a folder"}, of_routing=True)
    found_here(monkeypatch, demo=study, alone=replace(study, name="alone", runs=()), studies=studies)
    Path("seen").mkdir()
    with pytest.raises(UsageError, match=message):
        reproduce.reproduce(*call)
    assert not seen


def test_a_report_needs_no_training(study, seen, tmp_path):
    directory = write_sweep(tmp_path / "mine/gating_residual-smoke", {"vanilla": {0: 3.0}})
    reproduce.report("demo", "smoke", Path("mine"), out=tmp_path / "out")
    assert seen[0].directories == {"gating_residual": directory.relative_to(tmp_path)}
    assert (tmp_path / "out/demo/smoke/report.md").exists() and not (directory / "report").exists()


@pytest.mark.parametrize(("overrides", "folder"), [([], "gpu"), (["size=1b"], "gpu-1b")])
def test_runs_of_another_size_are_reported_beside_those_of_the_scales_own(monkeypatch, tmp_path, overrides, folder):
    monkeypatch.chdir(tmp_path)
    arms = discover()["table3"].measure.design.arms
    directory = write_sweep(tmp_path / "runs/tau-gpu", {arm: {0: 3.0, 1: 3.1} for arm in arms})
    write_json(directory / "sweep.json", read_json(directory / "sweep.json") | {"scale": "gpu", "overrides": overrides})
    for config in directory.glob("trials/*/config.yaml"):
        config.write_text(f"tags: {{size: 1b}}\ntracking: {{backend: jsonl}}\n{config.read_text()}")
    reproduce.report("table3", "gpu", out=tmp_path / "results")
    assert [path.parent.name for path in (tmp_path / "results/table3").glob("*/report.md")] == [folder]


def test_a_flag_that_no_comparison_takes_is_refused():
    with pytest.raises(UsageError, match="tasks_dir belongs to tasks"):
        reproduce.reproduce("table5", "smoke", flags={"tasks_dir": "x"})


def test_table2_counts_the_configs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    reproduce.reproduce("table2", "laptop")
    text = (tmp_path / "runs/table2-paper/report/report.md").read_text()
    assert "| 7b | vanilla | 16 + 0/0/0 | 7.676 | 7 | 1.334 | 1.234 | 1.2 | 0 |" in text
    assert "**fails**: 7b: total parameters round to the paper's 7: 7.676 billion." in text


def test_trials_are_scored_on_tasks_between_training_and_report(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")
    done = []
    monkeypatch.setattr("moepp.sweeps.runner.run_sweep", lambda *_, **__: done.append("trained") or tmp_path)
    monkeypatch.setattr("moepp.sweeps.timing.time_arms", lambda directory: done.append("timed"))
    monkeypatch.setattr("moepp.evaluation.commands.evaluate_sweep", lambda *asked: done.append(asked))
    monkeypatch.setattr(reproduce, "_publish", lambda *_: done.append("reported"))
    (tmp_path / "sciq.jsonl").touch()
    write_json(tmp_path / "sweep.json", {"trials": []})
    reproduce.reproduce("table5", "smoke", flags={"tasks": "sciq", "tasks_dir": str(tmp_path), "limit": "5"})
    assert done == ["trained", "timed", (tmp_path, "sciq", tmp_path, 5), "reported"]
    assert read_json(tmp_path / "tasks.json") == {"tasks": "sciq", "tasks_dir": str(tmp_path), "limit": "5"}
    asked = {"tasks": "sciq", "tasks_dir": str(tmp_path)}
    for wrong, message in (
        ({"tasks_dir": "nowhere"}, "is no folder"),
        ({"tasks": "piqa"}, "has no data for task piqa: it needs piqa.jsonl"),
        ({"tasks": "scqi", "tasks_dir": None}, "has no task 'scqi'; did you mean sciq"),
    ):
        given = {name: value for name, value in (asked | wrong).items() if value}
        with pytest.raises(UsageError, match=message):
            reproduce.reproduce("table5", "smoke", flags=given)
    assert len(done) == 4  # what cannot be scored is said before anything is trained
