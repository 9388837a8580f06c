import subprocess
import sys

import pytest

from experiments import discover
from moepp.reports.experiment import Experiment
from moepp.reports.study import SCALES, Study
from moepp.sweeps.spec import load_sweep

PRINTED = {  # averages as the paper prints them
    "table3": {"vanilla": 44.3, "tau_0.10": 43.4, "tau_0.25": 44.9, "tau_0.50": 44.9, "tau_0.75": 45.6,
               "tau_1.00": 44.5},
    "table5": {"vanilla": 46.6, "zero": 47.0, "copy": 47.2, "constant": 47.4, "zero+copy": 47.2, "zero+constant": 47.3,
               "copy+constant": 47.5, "zero+copy+constant": 47.7},
    "table6": {"vanilla": 46.6, "no_residual": 47.5, "zero+copy+constant": 47.7},
}  # fmt: skip


COMPARISONS = {name: found for name, found in discover().items() if isinstance(found, Experiment)}
STUDIES = {name: found for name, found in discover().items() if isinstance(found, Study)}


@pytest.fixture(params=sorted(COMPARISONS))
def experiment(request) -> Experiment:
    return COMPARISONS[request.param]


@pytest.fixture(params=sorted(STUDIES))
def study(request) -> Study:
    return STUDIES[request.param]


def test_a_file_name_is_its_experiments_name():
    assert all(name == experiment.name for name, experiment in discover().items())
    assert set(discover()) >= set(PRINTED)


def test_every_experiment_is_complete(experiment):
    sweep = load_sweep(experiment.sweep)
    assert set(experiment.arms) <= set(sweep.arms) and sweep.baseline in experiment.arms
    if experiment.paper:
        assert set(experiment.arms) == set(experiment.paper)
        assert all(len(row.scores) == len(experiment.tasks) for row in experiment.paper.values())
        assert experiment.noisy_task in experiment.tasks and experiment.reference and experiment.paper_size
    for arms in experiment.trend.series.values() if experiment.trend else ():
        assert set(arms) <= set(experiment.arms)
    for contrast in experiment.contrasts.values():
        assert set(contrast.on) | set(contrast.off) <= set(experiment.arms) and not set(contrast.on) & set(contrast.off)


def test_every_study_is_complete(study):
    assert study.question.endswith("?") and study.expected and set(study.scales) <= set(SCALES)
    for runs in study.runs:
        sweep = load_sweep(runs.sweep)
        assert set(runs.arms) <= set(sweep.arms) and set(study.scales) <= set(sweep.scales)
    assert all(len(row) == len(table.columns) for table in study.paper for row in table.rows)


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_task_scores_give_the_papers_printed_averages(name):
    assert {arm: row.average for arm, row in discover()[name].paper.items()} == PRINTED[name]


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
    experiment = discover()["table3"].at_size(size)
    averages, without, gains = TABLE3[size]
    rows = list(experiment.paper.values())
    assert tuple(row.average for row in rows) == averages
    assert [experiment.average_without_noisy_task(row) for row in rows] == pytest.approx(without, abs=0.006)
    assert tuple(round(100 * (row.speedup - 1), 1) for row in rows[1:]) == pytest.approx(gains, abs=0.11)
    assert all(len(row.scores) == len(experiment.tasks) for row in rows)


def test_the_ffn_shares_of_table3_follow_each_sizes_experts():
    table3 = discover()["table3"]
    shares = {size: rows["tau_0.75"].ffn_share for size, rows in table3.paper_sizes.items()}
    assert shares == pytest.approx({"0.6b": 0.6, "1b": 0.75, "2b": 0.75, "7b": 0.75})
    assert table3.at_size("tiny") == table3 and table3.paper_size == "0.6b"


def test_table5_effects_split_the_eight_arms_in_halves():
    experiment = discover()["table5"]
    for name, contrast in experiment.contrasts.items():
        kind = name.split()[0]
        assert (len(contrast.on), len(contrast.off)) == (4, 4) and kind in contrast.on
        assert {"+".join(part for part in arm.split("+") if part != kind) or "vanilla" for arm in contrast.on} == set(
            contrast.off
        )
    assert experiment.paper_effect("zero experts") == pytest.approx(0.125)


def test_listing_experiments_imports_nothing_heavy():
    heavy = ("torch", "lightning", "mlflow", "matplotlib", "numpy", "scipy", "datasets")
    script = (
        f"import sys; from experiments import discover; discover(); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
        check=True,
    )
    assert done.stdout.strip() == "[]"
