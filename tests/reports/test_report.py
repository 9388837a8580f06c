import csv
import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
from moepp.experiments.table3 import EXPERIMENT as TABLE3
from moepp.experiments.table6 import EXPERIMENT as TABLE6
from synthetic_sweep import compared, write_sweep, write_times, written

from moepp.records import read_json, write_json
from moepp.reports.arms import of_records
from moepp.reports.comparison import compare
from moepp.reports.experiment import Context
from moepp.reports.report import terminal
from moepp.reports.results import load_sweep_results
from moepp.reports.sweep_report import findings
from moepp.reports.tables import quality_table
from moepp.statistics.tables import as_markdown, quantity

FULL = "zero+copy+constant"
ARMS = TABLE3.measure.design.arms
LOSSES = {
    "vanilla": {0: 3.200, 1: 3.260, 2: 3.170},
    "no_residual": {0: 3.205, 1: 3.250, 2: 3.172},
    FULL: {0: 3.099, 1: 3.160, 2: 3.071},
}
TIMES = {"vanilla": (12.0, 1.0), "no_residual": (10.0, 0.75), FULL: (10.0, 0.75)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep"), LOSSES, TIMES)


@pytest.fixture(scope="module")
def report(sweep):
    written(TABLE6, sweep, sweep / "report")
    return sweep / "report"


def test_returns_exactly_the_files_it_wrote(sweep):
    files = written(TABLE6, sweep, sweep / "again")
    assert files[0].name == "report.md"
    assert sorted(files) == sorted((sweep / "again").iterdir())


def test_the_same_records_give_the_same_bytes_in_another_process(sweep, report):
    again = sweep / "other"
    script = (
        "import sys; from pathlib import Path; from moepp.experiments.table6 import EXPERIMENT\n"
        "from reports.synthetic_sweep import written; written(EXPERIMENT, Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", script, sweep, again],
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"},
    )
    names = sorted(path.name for path in report.iterdir())
    assert names == sorted(path.name for path in again.iterdir()) and "differences.svg" in names
    assert [name for name in names if (report / name).read_bytes() != (again / name).read_bytes()] == []


def test_the_table_holds_full_precision_and_the_papers_row(report):
    rows = {row["arm"]: row for row in csv.DictReader((report / "table.csv").open())}
    full = rows[FULL]
    assert float(full["val_loss"]) == pytest.approx(3.11) and float(full["difference"]) == pytest.approx(-0.1)
    assert float(full["difference_low"]) < -0.1 < float(full["difference_high"]) < 0
    assert float(full["learned_speedup"]) == 1.2 and float(full["learned_ideal_speedup"]) == pytest.approx(4 / 3)
    assert (full["seeds"], full["experts"], full["paper_average"]) == ("0 1 2", "8 + 1/1/2", "47.7")
    assert rows["vanilla"]["difference"] == "" and rows["vanilla"]["learned_speedup"] == "1.0"


def test_figures_carry_the_numbers_they_show(report):
    rows = {row["difference"]: row for row in csv.DictReader((report / "differences.csv").open())}
    assert float(rows[f"{FULL} – vanilla"]["mean"]) == pytest.approx(-0.1)
    assert float(rows["effect of the gating residual"]["mean"]) == pytest.approx(-0.099)
    curve = list(csv.DictReader((report / "curves.csv").open()))
    assert float([row for row in curve if row["arm"] == FULL][-1]["minus_baseline"]) == pytest.approx(-0.1)
    assert all(
        (report / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("differences", "speedup", "curves")
    )


def test_the_report_has_the_papers_numbers_the_verdict_and_the_command(report):
    text = (report / "report.md").read_text()
    assert "python run.py reproduce table6 --scale laptop" in text
    assert f"| {FULL} | 3 | 3.1100 ± " in text and "| 47.7 | +1.1 |" in text
    assert "Hardware: cpu two cores." in text
    assert "- Secondary, no_residual minus vanilla: -0.0010" in text and "Effect of the gating residual" not in text
    assert "nan" not in text.lower() and "Missing runs" not in text


def test_the_paper_has_a_section_with_its_scores_by_task(report):
    text = (report / "report.md").read_text()
    section = text[text.index("## The paper's numbers") : text.index("## Notes")]
    full = f"| 1B | {FULL} | 70.3 | 51.7 | 49.7 | 44.6 | 27.6 | 46.3 | 43.9 | 47.7 | 47.97 | 0.750 | 500.3 | 1.22 |"
    assert full in section and "| 1B | no_residual | 69.0 | 51.3 |" in section and "| 47.5 |" in section
    assert "Beside the paper's Table 6 (MoE++, arXiv 2410.07348)." in text


def sized(directory, losses, model):
    """A sweep whose runs record a size and the model that this size has."""
    write_sweep(directory, losses)
    for trial in read_json(directory / "sweep.json")["trials"]:
        own = {**model, "experts": {"ffn": 16, "zero": 0, "copy": 0, "constant": 0}}
        config = {"tags": {"size": "1b"}, "model": own if trial["arm"] == "vanilla" else model}
        (directory / trial["path"] / "config.yaml").write_text(json.dumps(config))  # which is YAML
    return directory


def test_runs_of_a_size_stand_beside_the_papers_rows_of_that_size(tmp_path):
    balance = {"form": "switch", "control": None, "beta": 0.01, "tau": 0.75}
    experts = {"ffn": 16, "zero": 1, "copy": 1, "constant": 2}
    sized(tmp_path, {arm: {0: 3.0, 1: 3.1} for arm in ARMS}, {"experts": experts, "balance": balance})
    written(TABLE3, tmp_path, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    quality = next(line for line in text.splitlines() if line.startswith("| tau_0.75 | 2 |"))
    assert quality.endswith("| 46.1 | +0.8 |")
    cost = next(line for line in text.splitlines() if line.startswith("| tau_0.75 | 16 + 1/1/2 |"))
    assert "| 0.750 | 0.750 |" in cost and cost.endswith("| 0.750 | 1.22 |")  # reached, target; the paper's
    assert "| vanilla | 16 + 0/0/0 | 1.500 | 0.750 | 1.000 |" in text
    section = text[text.index("## The paper's numbers") :]
    assert section.index("| 0.6B | vanilla |") < section.index("| 1B | vanilla |") < section.index("| 7B | vanilla |")
    assert "The paper's columns are of its 1B model" in text
    rows = {row["arm"]: row for row in csv.DictReader((tmp_path / "report/table.csv").open())}
    assert rows["tau_0.75"]["ffn_share_target"] == "0.75" and rows["tau_0.10"]["paper_average"] == "45.8"


def test_arms_that_the_paper_lacks_at_a_size_show_none_of_its_numbers(tmp_path):
    directory = write_sweep(tmp_path, {arm: {0: 3.0 + i / 10, 1: 3.1 + i / 10} for i, arm in enumerate(ARMS)})
    design = TABLE3.measure.design
    comparison = compare(replace(design, paper=design.paper.at_size("7b")), load_sweep_results(directory))
    table = {row[0]: row for row in quality_table(comparison).rows}
    assert table["tau_0.75"][-2:] == ("53.1", "+0.8") and table["tau_0.10"][-2:] == ("–", "–")
    assert comparison.ordering.ranked == 1
    assert comparison.design.paper.effect(design.contrasts["tau 0.10 in place of 0.75"]) is None
    assert findings(comparison).sections["Quality"]


def test_the_command_is_the_one_that_made_the_runs(tmp_path):
    directory = write_sweep(tmp_path / "my runs/zero_computation_experts-laptop", LOSSES)
    plan = read_json(directory / "sweep.json")
    given = {"overrides": ["model.gate=softmax", "runs=moved since"], "file_seeds": [0, 1]}
    write_json(directory / "sweep.json", plan | given)
    write_json(directory / "tasks.json", {"tasks": "sciq,boolq:0", "tasks_dir": "my data"})
    written(TABLE6, directory, tmp_path / "report")
    command = json.loads((tmp_path / "report/provenance.json").read_text())["command"]
    words = ["--seeds", "0", "1", "2", "tasks=sciq,boolq:0", "tasks_dir=my data", "model.gate=softmax"]
    made = ["python", "run.py", "reproduce", "table6", "--scale", "laptop", *words, f"runs={tmp_path / 'my runs'}"]
    assert shlex.split(command) == made
    assert f"Made by `{command}`" in (tmp_path / "report/report.md").read_text()


def test_a_command_without_extras_is_short(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    directory = write_sweep(tmp_path / "runs/sweep-laptop", LOSSES).relative_to(tmp_path)
    write_json(directory / "sweep.json", read_json(directory / "sweep.json") | {"file_seeds": [0, 1, 2]})
    written(TABLE6, directory, tmp_path / "report")
    assert "Made by `python run.py reproduce table6 --scale laptop`." in (tmp_path / "report/report.md").read_text()


def test_effective_speedup_is_not_read_off_an_unfinished_schedule(report):
    assert "Not known: the baseline has finished runs of one length." in (report / "report.md").read_text()


def test_an_experiment_of_our_own_shows_no_papers_numbers(tmp_path):
    write_sweep(tmp_path, LOSSES, TIMES)
    effect = {"contrasts": {"the gating residual": {"arms": [FULL], "minus": ["no_residual"]}}, "notes": ["Mind this."]}
    write_json(tmp_path / "sweep.json", read_json(tmp_path / "sweep.json") | effect)
    ours = of_records(tmp_path)
    written(ours, tmp_path, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert (
        "Effect of the gating residual" in text
        and f"| {FULL} | 3 | 3.1100 ± " in text
        and "## Notes\n\n- Mind this." in text
    )
    assert not any("paper" in line.lower() for line in text.splitlines() if line.startswith("|"))
    assert "arXiv" not in text and "paper" not in (tmp_path / "report/table.csv").read_text()
    assert "paper" not in terminal(ours.measure(Context("laptop", {ours.name: tmp_path})))


def test_without_timings_the_columns_are_empty_and_the_report_says_so(tmp_path):
    write_sweep(tmp_path, LOSSES, TIMES)
    written(TABLE6, tmp_path, tmp_path / "report")
    (tmp_path / "timing.json").unlink()
    written(TABLE6, tmp_path, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "No `timing.json` beside the sweep" in text and "so no speed-up is shown" in text
    assert "| – | – | – | – | – | – |" in text
    assert len(list((tmp_path / "report").glob("speedup.*"))) == 3  # of the first report: nothing is deleted
    assert "speedup.svg" not in text


def test_a_timing_beside_other_work_is_not_taken_for_a_speed(tmp_path):
    write_sweep(tmp_path, LOSSES, TIMES)
    written(TABLE6, tmp_path, tmp_path / "report")
    timing = json.loads((tmp_path / "timing.json").read_text())
    timing["expert_forward"][0]["median_ms"] = 1.6 * timing["expert_forward"][0]["min_ms"]
    write_json(tmp_path / "timing.json", timing)
    written(TABLE6, tmp_path, tmp_path / "disturbed")
    for folder, disturbed in (("report", False), ("disturbed", True)):
        text = (tmp_path / folder / "report.md").read_text()
        assert ("up to 1.6 times as long" in text) == disturbed
        assert ("Fastest: " in text) != disturbed


def test_times_of_learned_routing_alone_still_make_a_figure(tmp_path):
    write_sweep(tmp_path, LOSSES)
    write_times(tmp_path, TIMES)
    timing = json.loads((tmp_path / "timing.json").read_text())
    timing["expert_forward"] = [row for row in timing["expert_forward"] if row["routing"] == "learned"]
    write_json(tmp_path / "timing.json", timing)
    written(TABLE6, tmp_path, tmp_path / "report")
    assert len((tmp_path / "report/speedup.csv").read_text().splitlines()) == 3


def test_one_seed_shows_a_dash_for_every_interval(tmp_path):
    write_sweep(tmp_path, {arm: {0: by_seed[0]} for arm, by_seed in LOSSES.items()})
    written(TABLE6, tmp_path, tmp_path / "report")
    assert f"| {FULL} | 1 | 3.0990 ± – | -0.1010 ± – | – |" in as_markdown(quality_table(compared(TABLE6, tmp_path)))
    assert "nan" not in (tmp_path / "report/report.md").read_text().lower()


def test_missing_seeds_are_listed_and_n_is_shown(tmp_path):
    write_sweep(tmp_path, LOSSES)
    (tmp_path / f"trials/{FULL}-1/done").unlink()
    written(TABLE6, tmp_path, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert f"## Missing runs\n\n- {FULL}, seed 1: not finished" in text and f"| {FULL} | 2 | 3.0850 ± " in text


def test_seeds_the_baseline_lacks_are_no_pairs(tmp_path):
    write_sweep(tmp_path, LOSSES)
    (tmp_path / "trials/vanilla-1/done").unlink()
    table = as_markdown(quality_table(compared(TABLE6, tmp_path)))
    assert f"| {FULL} | 3 (2 paired) | 3.1100 ± " in table and "| vanilla | 2 | 3.1850 ± " in table


def test_a_tiny_p_is_never_shown_as_zero(tmp_path):
    exact = {FULL: {seed: loss - 0.1 for seed, loss in LOSSES["vanilla"].items()}, "vanilla": LOSSES["vanilla"]}
    table = quality_table(compared(TABLE6, write_sweep(tmp_path, exact)))
    assert table.rows[2][4] == "<0.001"


def test_provenance_names_every_run_and_says_when_commits_differ(tmp_path):
    write_sweep(tmp_path, LOSSES)
    write_json(
        tmp_path / f"trials/{FULL}-1/provenance.json",
        {"git": {"sha": "def", "dirty": True}, "hardware": {"cpu": "two cores"}},
    )
    written(TABLE6, tmp_path, tmp_path / "report")
    provenance = json.loads((tmp_path / "report/provenance.json").read_text())
    assert provenance["git"][1] == {"value": {"dirty": True, "sha": "def"}, "runs": [f"{FULL}, seed 1"]}
    assert provenance["hardware"] == {"cpu": "two cores"} and provenance["first_run_began"] == "2023-11-14 22:13 UTC"
    assert {"arm": FULL, "seed": 1, "record": f"{FULL}-1"} in provenance["runs"] and len(provenance["runs"]) == 9
    text = (tmp_path / "report/report.md").read_text()
    assert (
        "The runs differ in git: see provenance.json." in text
        and "1 of 9 runs was made with uncommitted changes." in text
    )


def test_the_terminal_table_is_aligned_and_narrow(sweep, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    answer, *lines = terminal(TABLE6.measure(Context("laptop", {TABLE6.runs[0].sweep: sweep}))).splitlines()
    assert answer.startswith(f"{FULL} ends with a lower validation loss than no_residual") and not lines.pop(0)
    assert len({len(line) for line in lines[:4]}) == 1 and max(map(len, lines[:5])) <= 80
    assert lines[3].split()[:8] == [FULL, "3", "3.1100", "±", "0.1130", "-0.1000", "±", "0.0025‡"]
    assert lines[3].split()[-2:] == ["1.50", "1.20"]  # FFN experts per token, speed-up; the rest with --wide


def test_tracker_metrics_are_named_after_the_arms(sweep):
    metrics = findings(compared(TABLE6, sweep)).metrics
    assert metrics["report/zero+copy+constant/val_loss_minus_baseline"] == pytest.approx(-0.1)
    assert "report/vanilla/val_loss_minus_baseline" not in metrics


@pytest.mark.parametrize(
    "value, text", [(None, "–"), (999, "999"), (1_234_567, "1.23M"), (2.5e9, "2.5G"), (0.5, "0.5")]
)
def test_quantities_are_short(value, text):
    assert quantity(value) == text
