import subprocess
import sys

import pytest

from moepp.experiments import discover
from moepp.reports.experiment import SCALES, Experiment
from moepp.sweeps.reading import read_sweep

PRINTED = {  # averages as the paper prints them
    "table3": {"vanilla": 44.3, "tau_0.10": 43.4, "tau_0.25": 44.9, "tau_0.50": 44.9, "tau_0.75": 45.6,
               "tau_1.00": 44.5},
    "table5": {"vanilla": 46.6, "zero": 47.0, "copy": 47.2, "constant": 47.4, "zero+copy": 47.2, "zero+constant": 47.3,
               "copy+constant": 47.5, "zero+copy+constant": 47.7},
    "table6": {"vanilla": 46.6, "no_residual": 47.5, "zero+copy+constant": 47.7},
}  # fmt: skip


EXPERIMENTS = discover()


@pytest.fixture(params=sorted(EXPERIMENTS))
def experiment(request) -> Experiment:
    return EXPERIMENTS[request.param]


def design(name):
    return EXPERIMENTS[name].measure.design


def test_a_file_name_is_its_experiments_name():
    assert all(name == experiment.name for name, experiment in EXPERIMENTS.items())
    assert set(EXPERIMENTS) >= set(PRINTED)


def test_every_experiment_is_complete(experiment):
    assert experiment.question.endswith("?") and set(experiment.scales) <= set(SCALES)
    assert experiment.expected or experiment.name in PRINTED
    for runs in experiment.runs:
        sweep = read_sweep(runs.sweep)
        assert set(runs.arms) <= set(sweep.arms) and set(experiment.scales) <= set(sweep.scales)
    assert all(len(row) == len(table.columns) for table in experiment.paper for row in table.rows)


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_a_table_of_the_paper_fits_its_sweep(name):
    sweep, paper = read_sweep(EXPERIMENTS[name].runs[0].sweep), design(name).paper
    assert set(design(name).arms) == set(paper.rows) <= set(sweep.arms) and sweep.baseline in paper.rows
    assert all(len(row.scores) == len(paper.tasks) for row in paper.rows.values())
    assert paper.noisy_task in paper.tasks and EXPERIMENTS[name].reference and design(name).contrasts


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_task_scores_give_the_papers_printed_averages(name):
    assert {arm: row.average for arm, row in design(name).paper.rows.items()} == PRINTED[name]


TABLE3 = {  # size -> averages, averages without BoolQ (of vanilla MoE first) and throughput gains
    "0.6b": ((44.3, 43.4, 44.9, 44.9, 45.6, 44.5), (43.44, 41.65, 43.48, 43.50, 44.55, 44.25),
             (164.5, 92.7, 38.2, 25.2, 19.1)),
    "1b": ((45.3, 45.8, 45.9, 46.0, 46.1, 47.2), (45.83, 43.91, 44.51, 45.44, 46.06, 46.54),
           (111.2, 58.7, 30.1, 22.1, 15.2)),
    "2b": ((45.9, 46.3, 47.0, 46.4, 47.3, 48.6), (46.50, 44.81, 46.08, 46.58, 47.21, 47.35),
           (63.5, 44.3, 28.3, 21.8, 15.7)),
    "7b": ((52.3, 53.1), (52.16, 52.70), (27.8,)),
}  # fmt: skip


@pytest.mark.parametrize("size", TABLE3)
def test_table3_of_every_size_gives_what_the_paper_derives_from_it(size):
    paper = design("table3").paper.at_size(size)
    averages, without, gains = TABLE3[size]
    rows = list(paper.rows.values())
    assert tuple(row.average for row in rows) == averages
    assert [paper.average_without_noisy_task(row) for row in rows] == pytest.approx(without, abs=0.006)
    speedups = [paper.speedup(arm) for arm in paper.rows]
    assert speedups[0] is None
    assert tuple(round(100 * (speedup - 1), 1) for speedup in speedups[1:]) == pytest.approx(gains, abs=0.11)
    assert all(len(row.scores) == len(paper.tasks) for row in rows)


def test_the_ffn_shares_of_table3_follow_each_sizes_experts():
    paper = design("table3").paper
    shares = {size: rows["tau_0.75"].ffn_share for size, rows in paper.sizes.items()}
    assert shares == pytest.approx({"0.6b": 0.6, "1b": 0.75, "2b": 0.75, "7b": 0.75})
    assert paper.at_size("tiny") == paper and paper.size == "0.6b"


def test_table5_effects_split_the_eight_arms_in_halves():
    contrasts = design("table5").contrasts
    assert list(contrasts) == ["zero experts", "copy experts", "constant experts"]  # the residual is Table 6's
    assert list(design("table6").contrasts) == ["the gating residual"]
    for name, contrast in contrasts.items():
        kind = name.split()[0]
        assert (len(contrast.arms), len(contrast.minus)) == (4, 4) and kind in contrast.arms
        without = {"+".join(part for part in arm.split("+") if part != kind) or "vanilla" for arm in contrast.arms}
        assert without == set(contrast.minus)
    assert design("table5").paper.effect(contrasts["zero experts"]) == pytest.approx(0.125)


def test_listing_experiments_imports_nothing_heavy():
    heavy = ("torch", "lightning", "mlflow", "matplotlib", "numpy", "scipy", "datasets")
    discovered = "import sys; from moepp.experiments import discover; discover()"
    script = f"{discovered}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
        check=True,
    )
    assert done.stdout.strip() == "[]"
