"""The first line of a report, secondary contrasts after Holm, what a rule excludes, and what deviates from a plan."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from synthetic_sweep import write_sweep

from moepp.config import save
from moepp.records import read_json, write_json
from moepp.reports import reproduce
from moepp.reports.answer import _weighed
from moepp.reports.arms import of_records, of_sweep
from moepp.reports.experiment import Context
from moepp.sweeps.reading import read_sweep
from moepp.sweeps.registration import register

SWEEP = """\
name: mine
question: Does my idea help?
base: [size=smoke, tracking=jsonl]
scales: {laptop: {seeds: 0..3}}
baseline: plain
arms: {plain: [model=vanilla], one: [], two: [model.balance.tau=0.5]}
contrasts: {two over one: {arms: [two], minus: [one]}}
primary: {contrast: one, smallest: 0.02, sd: 0.01}
exclusions: {loss_above_step: 50}
"""
PLAIN = {0: 3.20, 1: 3.30, 2: 3.25, 3: 3.22}
LOSSES = {
    "plain": PLAIN,
    "one": {seed: loss - 0.1 - 0.001 * seed for seed, loss in PLAIN.items()},
    "two": {seed: loss - 0.1 + 0.02 * (-1) ** seed for seed, loss in PLAIN.items()},
}


@pytest.fixture
def records(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(SWEEP)
    directory = write_sweep(Path("runs/mine-laptop"), LOSSES)
    sweep = read_sweep("mine.yaml")
    for trial in sweep.trials("laptop"):
        save(trial.config, directory / f"trials/{trial.arm}-{trial.seed}/config.yaml")
    about = {"name": "mine", "baseline": "plain", "question": sweep.question, "notes": []}
    about |= {"contrasts": {"two over one": {"arms": ["two"], "minus": ["one"]}}}
    about |= {"primary": {"contrast": "one", "smallest": 0.02, "sd": 0.01}}
    about |= {"exclusions": {"loss_above_step": 50, "share_off_target": None}}
    write_json(directory / "sweep.json", read_json(directory / "sweep.json") | about)
    return directory


def found(directory):
    experiment = of_records(directory)
    return experiment.measure(Context("laptop", {"mine": directory}))


def registered(**changes):
    sweep = read_sweep("mine.yaml")
    sweep.registered = "after the start"
    register(sweep, "laptop", sweep.trials("laptop"))
    path = Path("results/mine/laptop/plan.json")
    write_json(path, read_json(path) | {"registered": "2023-01-01T00:00:00+00:00"} | changes)


def test_the_first_line_is_the_answer(records):
    reproduce.report(str(records), "laptop")
    title, answer, *_ = (records / "report/report.md").read_text().split("\n\n")
    assert title == "# Mine"
    assert answer.startswith(
        "**one ends with a lower validation loss than plain, beyond noise, by more than the 0.02 that matters:"
        " -0.1015 nats per token (95 % interval -0.1036 to -0.0994), n = 4 paired seeds, p = 5.7e-07"
    )
    assert answer.endswith("Not registered beforehand.**") and "1.00 times the FFN experts per token" in answer


def test_secondary_contrasts_are_corrected_over_all_of_them(records):
    secondary = [line for line in found(records).verdict if line.startswith("Secondary")]
    assert [line.partition(": ")[0] for line in secondary] == ["Secondary, two minus plain", "Secondary, two over one"]
    assert "p = 0.0065 after Holm; beyond noise" in secondary[0]
    assert secondary[1].endswith("p = 0.9 after Holm; not distinguishable from none.")


def test_a_report_may_open_with_a_secondary_contrast_after_its_correction(records):
    told = of_sweep("mine.yaml", opening="two over one").measure(Context("laptop", {"mine.yaml": records}))
    assert told.answer.startswith("two and one cannot be told apart here, and whether by the 0.02 that matters is open")
    assert "p = 0.9 after Holm" in told.answer and "Secondary. Not registered" in told.answer
    assert told.verdict[0].startswith("Primary, one: -0.1015") and told.verdict[0].endswith("; beyond noise.")
    secondary = [line for line in told.verdict if line.startswith("Secondary")]
    assert [line.partition(": ")[0] for line in secondary] == ["Secondary, two minus plain"]


def test_a_contrast_has_one_p_in_sentences_and_tables_whatever_else_a_report_shows(records):
    """Over both secondary contrasts of the sweep, whether a report shows all arms or two."""
    measure, context = of_sweep("mine.yaml").measure, Context("laptop", {"mine.yaml": records})
    part = replace(measure, design=replace(measure.design, arms=("plain", "two"), contrasts={}))
    for findings in (measure(context), part(context)):
        quality, how_to_read = findings.sections["Quality"]
        assert {row[0]: row[4] for row in quality.rows}["two"] == "0.006"
        assert "over all contrasts of the sweep but the primary one" in " ".join(how_to_read.split())
    assert "p = 0.0065 after Holm" in measure(context).verdict[0] and len(quality.rows) == 2


def test_what_would_be_seen_of_the_primary_contrast_needs_no_correction(records):
    noise, _ = found(records).sections["Noise floor"]
    seen = {row[0]: row[4:6] for row in noise.rows}
    assert seen["one"][0] == seen["one"][1] and float(seen["two"][0]) < float(seen["two"][1])


def test_an_interval_beyond_what_matters_is_no_difference_where_the_test_says_none():
    found = SimpleNamespace(robust=SimpleNamespace(median=0.3, low=0.2, high=0.35), estimate=None)
    assert _weighed(found, 0.03, beyond_noise=True) == "by more than the 0.03 that matters"
    assert _weighed(found, 0.03, beyond_noise=False) == "though the whole interval lies beyond the 0.03 that matters"


def test_what_a_rule_excludes_is_shown_with_and_without(records):
    metrics = records / "trials/one-3/metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[-1]["final/val_loss"] = 9.0
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    findings = found(records)
    assert "n = 3 paired seeds" in findings.answer
    assert "With the 1 run that a rule excludes: " in findings.answer and "n = 4 paired seeds" in findings.answer
    assert "one, seed 3: ends at 9.0000, above its 4.1170 of step 50." in findings.sections["Excluded runs"][0]


def test_a_plan_that_was_kept(records):
    registered()
    findings = found(records)
    said = findings.sections["Registration"]
    assert findings.answer.endswith("Registered after the start, on 2023-01-01.") and said[-1] == "- Nothing deviates."
    assert "Primary contrast: one (one minus plain); the smallest difference that matters: 0.02." in said[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [0, 1, 2]}, "With a result, but not registered: one, seeds 3."),
        ({"seeds": [0, 1, 2, 3, 4]}, "Registered, but without a result: two, seeds 4."),
        (
            {"config": {"model.experts.ffn": 8}},
            "two: model.experts.ffn was registered as 8, and is 4 (seeds 0 to 3).",
        ),
        ({"exclusions": {"loss_above_step": 25}}, "The loss_above_step was registered as 25, and is 50."),
        (
            {"primary": {"name": "two", "arms": ["two"], "minus": ["plain"], "smallest": 0.02}},
            "The primary contrast was registered as two, and is one.",
        ),
        ({"registered": "2024-01-01T00:00:00+00:00"}, "12 runs began before the registration: plain s0, "),
    ],
)
def test_what_deviates_is_said(records, changes, said):
    registered(**changes)
    assert said in found(records).sections["Registration"][-1]
