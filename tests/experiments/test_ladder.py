"""What the ladder concludes from records whose losses follow laws that the test chooses."""

import io

import pytest
from drawn_text import faults
from reports.synthetic_sweep import write_run, write_sweep

from moepp.experiments import ladder
from moepp.records import read_json, write_json
from moepp.reports.experiment import Context
from moepp.reports.ladder import FAMILIES, Rung, laws_of
from moepp.reports.report import write_report
from moepp.statistics import power_law
from moepp.statistics.style import styled

SIZES = {"1": 3e5, "2": 7e5, "3": 1.5e6, "4": 4e6}
LENGTHS, SHORTEST = (1.0, 2.0, 4.0), 2e5
PROVENANCE = {"command": "python run.py", "scale": "desk", "started": "2026-01-01", "hardware": {}}


def loss_of(family, size, tokens):
    """MoE++ is vanilla MoE with 1.5 times its tokens."""
    return 2.0 + 0.5 * (size / 1e6) ** -0.3 + 1.5 * (tokens * (1.5 if family == "moepp" else 1.0) / 4e5) ** -0.4


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(power_law, "DRAWS", 40)
    directory, trials = write_sweep(tmp_path / "ladder-desk", {}), []
    for family in FAMILIES:
        for rung, size in SIZES.items():
            for length in LENGTHS:
                for seed in (0, 1):
                    arm, tokens = f"{family}_{rung}", SHORTEST * length
                    trial = {"arm": arm, "seed": seed, "path": f"{arm}-{length:g}-{seed}"}
                    write_run(directory / trial["path"], loss_of(family, size, tokens) + 0.002 * (seed - 0.5))
                    flops = 2e6 if family == "vanilla" else 1.6e6
                    budget = {"total_params": size, "flops_per_token": flops, "tokens": tokens}
                    write_json(directory / trial["path"] / "budget.json", budget)
                    trials.append(trial if length == 1 else {**trial, "of_arm": arm, "length": length})
    plan = read_json(directory / "sweep.json")
    about = {"name": "ladder", "scale": "desk", "baseline": "vanilla_1", "match": "none"}
    write_json(directory / "sweep.json", plan | about | {"trials": trials})
    return Context("desk", {"ladder": directory})


def rows(found, name):
    return next(table.rows for table in found.tables if table.name == name)


def test_the_laws_of_both_families_are_drawn_apart():
    """Else what is said of their ratio would be of one draw, not of two."""
    rungs = [
        Rung(family, rung, size, SHORTEST * length, 1e6, {0: loss + 0.002, 1: loss - 0.002})
        for family in FAMILIES
        for rung, size in SIZES.items()
        for length in LENGTHS
        for loss in [loss_of("vanilla", size, SHORTEST * length)]
    ]
    one, other = laws_of(rungs)[0].values()
    assert (one.fits_FP[0] == other.fits_FP[0]).all() and (one.fits_FP[1:] != other.fits_FP[1:]).any(1).all()


def test_laws_foretell_the_largest_size_and_the_speed_up(records, tmp_path):
    found = ladder.measure(records)
    assert {claim.verdict for claim in found.claims} == {"holds"} and len(found.claims) == 6
    assert all(row[3] == 2 and abs(row[8]) < 0.005 for row in rows(found, "held_out"))
    speedups = found.figures[1].data.rows
    assert len(speedups) == 12 and all(row[4] == pytest.approx(1.5 * 2 / 1.6, rel=0.05) for row in speedups)
    assert all(row[5] <= row[4] <= row[6] for row in speedups)
    assert found.answer.count("cannot be told to grow or shrink") == 2
    assert "Not registered beforehand" in found.answer
    vanilla, _, tokens = rows(found, "prediction")
    assert vanilla[1] == pytest.approx(loss_of("vanilla", 0.6e9, 100e9), abs=0.2) and vanilla[2] < vanilla[3]
    assert tokens[2] < 1.5 < tokens[3]
    write_report(ladder.EXPERIMENT, found, tmp_path / "out", PROVENANCE)
    for figure in found.figures:
        with styled():
            figure.draw().savefig(text := io.StringIO(), format="svg")
        assert faults(text.getvalue()) == []


def test_a_report_says_what_was_predicted_beforehand(records):
    plan = {"registered": "2026-01-01T00:00:00+00:00", "when": "before the start", "code": {"sha": "abc"}, "config": {},
            "predictions": ["It is the same."], "arms": {"moepp_1": {"differs": {}}}, "seeds": [0, 1],
            "exclusions": {"loss_above_step": None, "share_off_target": None}}  # fmt: skip
    write_json(records.directories["ladder"].parent / "results/ladder/desk/plan.json", plan)
    found = ladder.measure(records)
    assert found.answer.endswith("Registered before it ran, on 2026-01-01.")
    assert "- Prediction: It is the same." in found.sections["Registration"][0]
    assert "With a result, but not registered: vanilla_1, seeds 0, 1." in found.sections["Registration"][2]


def test_without_three_sizes_it_says_why_there_is_no_law(records):
    path = records.directories["ladder"] / "sweep.json"
    plan = read_json(path)
    write_json(path, plan | {"trials": [trial for trial in plan["trials"] if trial["arm"][-1] in "12"]})
    found = ladder.measure(records)
    assert "No law of MoE++: a power law in size and tokens needs three of each." in found.notes
    assert found.answer.startswith("No answer yet") and len(found.figures) == 1
