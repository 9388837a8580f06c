"""Everything in conf/, sweeps/ and experiments/ fits the code: all of it composes, every arm of every sweep trains, and
every experiment prints its report.
"""

import math
import random
import re
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from moepp.config import CONF, compose, compose_kind
from moepp.experiments import discover
from moepp.models.budget import expected_ffn_per_token, parameters
from moepp.models.decoder import Decoder
from moepp.reports import reproduce
from moepp.shipped import SWEEPS
from moepp.sweeps import reading
from moepp.sweeps.budgets import match_trials, require_match
from moepp.sweeps.job import Job
from moepp.sweeps.launchers import LAUNCHERS
from moepp.sweeps.timing import time_arms
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

read_sweep = cache(reading.read_sweep)  # each file is asked for by name many times
FRAGMENTS = {
    folder.name: sorted({path.stem for path in folder.glob("*.yaml")} - {"hf"})  # needs a folder: tests/retrofit
    for folder in CONF.iterdir()
    if folder.is_dir()
}
NAMES = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
SCALES = [(name, scale) for name in NAMES for scale in read_sweep(name).scales]
SPACES = [
    name for name in NAMES if read_sweep(name).space
]  # tests/reports/test_own_sweep.py; arms differ in values alone
ARMS = [(name, arm) for name in NAMES if name not in (*SPACES, "retrofit") for arm in read_sweep(name).arms]
SIZES = {"smoke": {"smoke"}, "laptop": {"tiny"}, "gpu": {"small", "mini"}}  # by scale
TWO_STEPS = [
    "size=smoke", "tracking=jsonl", "trainer.steps=2", "trainer.val_every=2", "trainer.checkpoint_every=2",
    "trainer.log_every=1", "trainer.progress=false", "trainer.expert_timing=false", "trainer.accelerator=cpu",
    "trainer.threads=1",
]  # fmt: skip
ELSEWHERE = {  # what trains or measures in processes of its own, or needs what no repository holds
    "expert_parallelism": "tests/benchmarks", "table4": "tests/experiments/test_table4.py",
    "ladder": "its arms differ in size, which is one here", "retrofit": "tests/retrofit/test_study.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Overrides of a run of two steps on texts with words to tell apart, its record where all tests here find it."""
    folder, draw = tmp_path_factory.mktemp("shipped"), random.Random(0)
    words = ["the", "expert", "routes", "tokens", "quickly", "and", "copies", "zero", "logits", "of", "gates"]
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(words[i % 4 :], k=120)))
    data = ["data=text", f"data.path={folder}/*.txt", f"data.cache={folder}/cache", "data.val_share=0.2"]
    return [*TWO_STEPS, *data, f"runs={folder}/runs"]


def train_arm(sweep, arm, overrides):
    """Of all sweeps: a run that several of them share is trained once."""
    anywhere = replace(sweep.scales["smoke"], arms=[], lengths=[])  # an arm need not be of this scale
    alone = replace(sweep, arms={arm: sweep.arms[arm]}, baseline=arm, scales={"smoke": anywhere})
    [trial] = alone.trials("smoke", overrides, seeds=[0])
    trial.config.name = "arms"
    config = freeze(trial.config)
    return train(config, run_directory(config))


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in FRAGMENTS.items() for name in names])
def test_fragment_composes(group, name):
    if group == "launcher":  # where a run is made is no part of its config
        assert isinstance(compose_kind("launcher", LAUNCHERS, [f"launcher={name}"]), LAUNCHERS[name])
        return
    assert isinstance(compose(RunConfig, [f"{group}={name}"]), RunConfig)


@pytest.mark.parametrize("model", FRAGMENTS["model"])
@pytest.mark.parametrize("size", FRAGMENTS["size"])
def test_size_takes_model(size, model):
    config = compose(RunConfig, [f"size={size}", f"model={model}"])
    with torch.device("meta"):
        decoder = Decoder(config.model)
    assert config.tags["size"] == size
    assert sum(weight.numel() for weight in decoder.parameters()) == sum(parameters(config.model).values())


@pytest.mark.parametrize(("recipe", "tokens"), [("s1", 100e9), ("s2", 900e9), ("s3", 100e9)])
def test_recipe_is_table_b(recipe, tokens):
    config = compose(RunConfig, [f"recipe={recipe}", "size=7b"])
    batch = config.data.batch_size * config.data.seq_len
    assert config.trainer.steps * batch == pytest.approx(tokens, rel=1e-4) and batch == 2**22
    assert config.data.corpus == "mixture" and sum(s.share for s in config.data.sources.values()) == pytest.approx(100)
    assert config.optim.lr == (1e-4 if recipe == "s3" else 5e-4) and config.optim.final_lr_share == 0.1


def test_a_recipe_leaves_the_corpus_to_whoever_names_one():
    assert compose(RunConfig, ["recipe=s1", "data=sotu"]).data.corpus == "sotu"


def test_equal_compute_arms_share_their_ffn_compute():
    trials = read_sweep("equal_compute").trials("laptop", seeds=[0])
    expected = {trial.arm: expected_ffn_per_token(trial.config.model) for trial in trials}
    assert expected.pop("vanilla") == 2.0
    assert len(expected) == 13 and expected == pytest.approx(dict.fromkeys(expected, 1.2))


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_sweep_composes_at_scale(name, scale):
    sweep = read_sweep(name)
    trials = sweep.trials(scale, seeds=[0])  # refuses arms that amount to the same run
    assert sweep.name == name and {trial.of_arm for trial in trials} == set(sweep.arms_at(scale))
    sizes = {trial.config.tags["size"] for trial in trials}
    assert name == "ladder" or (len(sizes) == 1 and sizes <= SIZES.get(scale, sizes))  # sizes are what it compares


@pytest.mark.parametrize(("name", "scale"), [pair for pair in SCALES if read_sweep(pair[0]).search(pair[1])])
def test_a_search_fits_at_both_ends_of_every_axis(name, scale):
    sweep = read_sweep(name)
    found = match_trials(sweep, scale, [], None, workers=1)  # composes them
    require_match(sweep.match, found.arms, found.seconds)
    assert len(found.arms) > len(sweep.arms)


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_begins_by_saying_what_it_answers(name):
    text = (SWEEPS / f"{name}.yaml").read_text()
    comment = text[: text.index("name:")]
    assert comment.startswith("# ") and "held equal" in comment.lower()
    assert {"smoke", "laptop"} <= set(read_sweep(name).scales)


def test_constant_experts_half_arms_share_their_ffn_compute():
    trials = read_sweep("constant_experts").trials("smoke", seeds=[0])  # whose size has other counts than the arms need
    expected = {trial.arm: expected_ffn_per_token(trial.config.model) for trial in trials}
    half = {arm: used for arm, used in expected.items() if arm.endswith("_half") or arm == "constant_4"}
    assert len(half) > 1 and half == pytest.approx(dict.fromkeys(half, 1.0))


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_arm_trains_two_steps(name, arm, two_steps):
    record = train_arm(read_sweep(name), arm, two_steps)
    assert record.status == "done"
    assert math.isfinite(record.final()["val_loss"])


@pytest.mark.parametrize("name", sorted({*discover(), *NAMES} - {*ELSEWHERE, *SPACES}))
def test_experiments_and_sweeps_print_their_reports(name, two_steps, tmp_path, monkeypatch, capsys, request):
    experiment = reproduce.find(name)
    if name not in discover():
        request.getfixturevalue("unrendered")
    for sweep, arms in ((read_sweep(runs.sweep), runs.arms) for runs in experiment.runs):
        for arm in arms or sweep.arms_at("smoke"):
            train_arm(sweep, arm, two_steps)
    monkeypatch.setattr(Job, "start", lambda job, *_: pytest.fail(f"{job.label} is trained again"))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # threads that spin for each other's core take minutes
    monkeypatch.setattr("moepp.sweeps.timing.time_arms", partial(time_arms, repeats=1))
    monkeypatch.chdir(tmp_path)
    reproduce.reproduce(name, "smoke", 1, two_steps if experiment.runs else [], seeds=[0], out=tmp_path / "out")
    [folder] = (tmp_path / "out" / name).iterdir()
    report = (folder / "report.md").read_text()
    assert experiment.question in report and f"report: {folder}" in capsys.readouterr().out
    if name in NAMES:
        said = [*read_sweep(name).contrasts_at("smoke"), *(note[:40] for note in read_sweep(name).notes)]
        assert not [words for words in said if words not in report]
    assert all((folder / figure).is_file() for figure in re.findall(r"\]\(([\w./]+)\)", report))
    assert not (tmp_path / "results").exists()
