"""What the studies conclude from records whose numbers the tests choose."""

import statistics

import pytest
from reports.synthetic_sweep import write_sweep
from scipy import stats

from moepp.config import load
from moepp.experiments import best_rate, seeds, table1, table2
from moepp.records import RunRecord, read_json, write_json
from moepp.reports.experiment import Context
from moepp.reports.report import write_report
from moepp.reports.targets import balanced_share
from moepp.training.settings import RunConfig

PROVENANCE = {"command": "python run.py", "scale": "laptop", "started": "2026-01-01", "hardware": {}}


def verdicts(report):
    return {claim.statement.partition(":")[0]: claim.verdict for claim in report.claims}


@pytest.fixture
def tau_sweep(tmp_path, monkeypatch):
    """Time is 0.25 + 0.75 of vanilla MoE's FFN compute, exactly; the FFN share of every arm is recorded as 0.75."""
    arms = ("vanilla", *table1.TAUS)
    shares = {arm: balanced_share(tau, 8, 4) for arm, tau in table1.TAUS.items()} | {"vanilla": 1.0}
    times = {arm: (100 * (0.25 + 0.75 * shares[arm]), shares[arm]) for arm in arms}
    directory = write_sweep(tmp_path / "tau", {arm: {0: 3.0, 1: 3.1} for arm in arms}, times)
    first = {arm: f"trials/{arm}-0".rpartition("/")[2] for arm in arms}
    write_json(directory / "timing.json", {**read_json(directory / "timing.json"), "runs": first})
    for arm in ("vanilla",):
        (directory / f"trials/{arm}-0/config.yaml").write_text(
            "model: {experts: {ffn: 8, zero: 0, copy: 0, constant: 0}}"
        )
    return Context("laptop", {"tau": directory})


def test_table1_finds_the_fixed_part_and_what_training_missed(tau_sweep, tmp_path):
    report = table1.measure(tau_sweep)
    found = verdicts(report)
    assert found["here, learned routing"] == "holds" and found["paper, 1B"] == "holds"
    assert found["tau_0.10"] == "fails"  # 0.75 recorded against 0.167
    by_series = {claim.statement: claim for claim in report.claims}
    fixed = next(claim for name, claim in by_series.items() if name.startswith("here, balanced routing"))
    assert fixed.effect == pytest.approx(0.25) and fixed.low == pytest.approx(0.25)
    assert [row[1] for row in report.tables[0].rows][:2] == pytest.approx([1.0, 0.8 / 4.8])
    files = write_report(table1.EXPERIMENT, report, tmp_path / "out", PROVENANCE)
    assert {"compute.csv", "fits.csv", "time.csv", "time.svg", "time.png"} <= {path.name for path in files}


def test_table1_counts_the_expert_flops_that_were_executed(tau_sweep):
    table = table1.measure(tau_sweep).tables[0]
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    config = load(RunConfig, tau_sweep.directories["tau"] / "trials/tau_0.75-0/config.yaml").model
    ffn, constant = (6 * config.layers * config.dim * by for by in (config.hidden, 1))
    executed = "expert FLOPs per token, executed"
    assert rows["vanilla"]["expert FLOPs per token, Table 1"] == pytest.approx(2 * ffn)
    assert rows["vanilla"][executed] == pytest.approx(1.5 * ffn)  # 1.5 FFN experts are recorded
    assert rows["tau_0.75"][executed] == pytest.approx(1.5 * ffn + 2 * constant)
    assert rows["tau_0.75"]["expert FLOPs per token, Table 1"] == pytest.approx(1.2 * ffn + 2 * constant)


@pytest.mark.parametrize(("lost", "series"), [("tau_0.10", "here, learned routing"), ("vanilla", None)])
def test_table1_reports_the_arms_there_are(tau_sweep, lost, series):
    for seed in (0, 1):
        (tau_sweep.directories["tau"] / f"trials/{lost}-{seed}/done").unlink()
    path = tau_sweep.directories["tau"] / "timing.json"
    times = read_json(path)
    kept = {arm: run for arm, run in times["runs"].items() if arm != lost}
    write_json(
        path, times | {"runs": kept, "expert_forward": [row for row in times["expert_forward"] if row["arm"] != lost]}
    )
    report = table1.measure(tau_sweep)
    assert len(report.tables[0].rows) == 5 and lost in report.notes[0]
    assert next(iter(verdicts(report)), "") and ((series in verdicts(report)) if series else True)
    assert ("no line is fitted" in report.notes[0]) == (series is None)


def test_table2_compares_every_number_of_the_shapes(monkeypatch):
    monkeypatch.setitem(table2.SHAPES, "1b", (12, 768, 2048, 16, 48, "16 + 1/1/2"))
    report = table2.measure(Context("paper"))
    shapes = {claim.statement[:2]: claim for claim in report.claims if "are the paper's" in claim.statement}
    assert {size: claim.verdict for size, claim in shapes.items()} == {
        "0.": "holds", "1b": "fails", "2b": "holds", "7b": "holds",
    }  # fmt: skip
    assert shapes["1b"].note == "heads 12, not 16; head width 64, not 48"
    assert len(set(report.tables[0].columns)) == len(report.tables[0].columns)


def test_seeds_tells_paired_from_unrelated_noise(tmp_path):
    base = {seed: 3 + 0.1 * (seed % 4) for seed in range(7)}
    ours = {seed: loss - 0.05 + 0.001 * (seed % 2) for seed, loss in base.items()}
    directory = write_sweep(tmp_path, {"vanilla": base, "moepp": ours})
    report = seeds.measure(Context("laptop", {"gating_residual": directory}))
    [claim] = report.claims
    assert claim.verdict == "holds" and claim.effect < 0.05
    detectable = {row[0]: row[1:] for row in report.tables[-1].rows}
    assert detectable[3][0] < detectable[3][1] and detectable[20][0] < detectable[3][0]
    pooled = (statistics.variance(base.values()) + statistics.variance(ours.values())) ** 0.5
    effect, critical = detectable[5][1] / (pooled / 5**0.5), stats.t.ppf(0.975, 8)
    assert 1 - stats.nct.cdf(critical, 8, effect) == pytest.approx(0.8, abs=1e-3)
    write_report(seeds.EXPERIMENT, report, tmp_path / "out", PROVENANCE)


def test_seeds_decides_nothing_where_the_noise_of_unrelated_seeds_is_as_unsure(tmp_path):
    """Five pairs with a moderate correlation: their paired deviation is lower, but not beyond its own scatter."""
    base = dict(enumerate([3.0, 3.1, 3.2, 3.05, 3.15]))
    ours = dict(enumerate([3.02, 3.05, 3.14, 3.09, 3.05]))
    directory = write_sweep(tmp_path, {"vanilla": base, "moepp": ours})
    [claim] = seeds.measure(Context("laptop", {"gating_residual": directory})).claims
    assert claim.verdict == "undecided" and claim.low < claim.effect < 1 < claim.high


def test_seeds_says_when_there_are_too_few(tmp_path):
    directory = write_sweep(tmp_path, {"vanilla": {0: 3.0, 1: 3.1}, "moepp": {0: 3.0, 1: 3.2}})
    report = seeds.measure(Context("laptop", {"gating_residual": directory}))
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
    write_json(directory / "sweep.json", sweep | {"baseline": "vanilla_0.01"})
    assert RunRecord(directory / "trials/moepp_0.01-0").status == "done"
    report = best_rate.measure(Context("laptop", {"learning_rate": directory}))
    own, shared = report.claims
    assert own.verdict == "holds" and own.effect == pytest.approx(-0.499)  # 2.5 against 3.0
    assert shared.verdict == "holds" and shared.effect == pytest.approx(-0.499)  # 3.5 against 4.0
    assert report.notes == (
        "Best rate of vanilla MoE: 0.005 (3 of 3 choices).", "Best rate of MoE++: 0.02 (3 of 3 choices).",
    )  # fmt: skip
    write_report(best_rate.EXPERIMENT, report, tmp_path / "out", PROVENANCE)

    for seed in range(3):
        (directory / f"trials/vanilla_0.04-{seed}/done").unlink()  # diverged with every seed
    (directory / "trials/moepp_0.01-1/done").unlink()
    report = best_rate.measure(Context("laptop", {"learning_rate": directory}))
    [own] = report.claims  # the shared rate is no longer there on both sides
    assert own.verdict == "holds" and own.effect == pytest.approx(-0.499)
    assert report.notes[:2] == (
        "Left out: vanilla MoE at 0.04, which lacks a finished run of seed 0, 1, 2.",
        "Left out: MoE++ at 0.01, which lacks a finished run of seed 1.",
    )
    write_report(best_rate.EXPERIMENT, report, tmp_path / "out", PROVENANCE)


def test_best_rate_without_a_whole_seed_says_so(tmp_path):
    losses = {f"{side}_{rate}": {i % 2: 3.0} for side in best_rate.SIDES for i, rate in enumerate(best_rate.RATES)}
    directory = write_sweep(tmp_path, losses)
    report = best_rate.measure(Context("laptop", {"learning_rate": directory}))
    assert not report.claims and "no rate can be chosen" in report.notes[-1]
    write_report(best_rate.EXPERIMENT, report, tmp_path / "out", PROVENANCE)
