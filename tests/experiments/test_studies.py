"""What the studies conclude from records whose numbers the tests choose."""

import pytest
from analysis.synthetic_sweep import write_sweep

from experiments import best_rate, seeds, table1
from moepp.analysis.study import StudyContext
from moepp.analysis.study_report import write_study
from moepp.records import RunRecord, read_json, write_json

PROVENANCE = {"command": "python run.py", "scale": "laptop", "started": "2026-01-01", "hardware": {}}


def verdicts(report):
    return {claim.statement.partition(":")[0]: claim.verdict for claim in report.claims}


@pytest.fixture
def tau_sweep(tmp_path, monkeypatch):
    """Time is 0.25 + 0.75 of vanilla MoE's FFN compute, exactly; the FFN share of every arm is recorded as 0.75."""
    arms = ("vanilla", *table1.TAUS)
    shares = {arm: table1.target_share(tau, 8, 4) for arm, tau in table1.TAUS.items()} | {"vanilla": 1.0}
    times = {arm: (100 * (0.25 + 0.75 * shares[arm]), shares[arm]) for arm in arms}
    directory = write_sweep(tmp_path / "tau", {arm: {0: 3.0, 1: 3.1} for arm in arms}, times)
    first = {arm: f"trials/{arm}-0".rpartition("/")[2] for arm in arms}
    write_json(directory / "expert_forward.json", {**read_json(directory / "expert_forward.json"), "runs": first})
    for arm in ("vanilla",):
        (directory / f"trials/{arm}-0/config.yaml").write_text(
            "model: {experts: {ffn: 8, zero: 0, copy: 0, constant: 0}}"
        )
    return StudyContext("laptop", {"tau": directory})


def test_table1_finds_the_fixed_part_and_what_training_missed(tau_sweep, tmp_path):
    report = table1.measure(tau_sweep)
    found = verdicts(report)
    assert found["here, learned routing"] == "holds" and found["paper, 1B"] == "holds"
    assert found["tau_0.10"] == "fails"  # 0.75 recorded against 0.167
    by_series = {claim.statement: claim for claim in report.claims}
    fixed = next(claim for name, claim in by_series.items() if name.startswith("here, balanced routing"))
    assert fixed.effect == pytest.approx(0.25) and fixed.low == pytest.approx(0.25)
    assert [row[1] for row in report.tables[0].rows][:2] == pytest.approx([1.0, 0.8 / 4.8])
    files = write_study(table1.STUDY, report, tmp_path / "out", PROVENANCE)
    assert {"compute.csv", "fits.csv", "time.csv", "time.svg", "time.png"} <= {path.name for path in files}


def test_seeds_tells_paired_from_unrelated_noise(tmp_path):
    base = {seed: 3 + 0.1 * (seed % 4) for seed in range(7)}
    ours = {seed: loss - 0.05 + 0.001 * (seed % 2) for seed, loss in base.items()}
    directory = write_sweep(tmp_path, {"vanilla": base, "moepp": ours})
    report = seeds.measure(StudyContext("laptop", {"gating_residual": directory}))
    [claim] = report.claims
    assert claim.verdict == "holds" and claim.effect < 0.05
    detectable = {row[0]: row[1:] for row in report.tables[-1].rows}
    assert detectable[3][0] < detectable[3][1] and detectable[20][0] < detectable[3][0]
    write_study(seeds.STUDY, report, tmp_path / "out", PROVENANCE)


def test_seeds_says_when_there_are_too_few(tmp_path):
    directory = write_sweep(tmp_path, {"vanilla": {0: 3.0, 1: 3.1}, "moepp": {0: 3.0, 1: 3.2}})
    report = seeds.measure(StudyContext("laptop", {"gating_residual": directory}))
    assert not report.claims and "Fewer than three seeds" in report.notes[0]


@pytest.mark.parametrize(("n", "low", "high"), [(10, 0.688, 1.826), (30, 0.796, 1.344)])
def test_the_interval_of_a_standard_deviation_is_the_textbooks(n, low, high):
    assert seeds.std_interval(1.0, n) == pytest.approx((low, high), abs=1e-3)


def test_best_rate_judges_each_side_at_the_rate_the_other_seeds_chose(tmp_path):
    losses = {f"vanilla_{rate}": {s: 3.0 + abs(i - 1) + 0.01 * s for s in range(3)}
              for i, rate in enumerate(best_rate.RATES)}  # fmt: skip
    losses |= {f"moepp_{rate}": {s: 2.5 + abs(i - 3) + 0.011 * s for s in range(3)}
               for i, rate in enumerate(best_rate.RATES)}  # fmt: skip
    directory = write_sweep(tmp_path, losses)
    sweep = read_json(directory / "sweep.json")
    write_json(directory / "sweep.json", sweep | {"baseline": "vanilla_0.005"})
    assert RunRecord(directory / "trials/moepp_0.01-0").status == "done"
    report = best_rate.measure(StudyContext("laptop", {"learning_rate": directory}))
    own, shared = report.claims
    assert own.verdict == "holds" and own.effect == pytest.approx(-0.499)  # 2.5 against 3.0
    assert shared.verdict == "holds" and shared.effect == pytest.approx(-0.499)  # 3.5 against 4.0
    assert report.notes == (
        "Best rate of vanilla MoE: 0.0025 (3 of 3 choices).", "Best rate of MoE++: 0.01 (3 of 3 choices).",
    )  # fmt: skip
    write_study(best_rate.STUDY, report, tmp_path / "out", PROVENANCE)
