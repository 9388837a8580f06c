"""Everything in conf/ and sweeps/ fits the code: all of it composes, and every arm of every sweep trains."""

import math
from dataclasses import replace

import pytest
import torch

from moepp.config import CONF, compose, compose_kind
from moepp.models.budget import expected_ffn_per_token, parameters
from moepp.models.decoder import Decoder
from moepp.sweeps.budgets import match_trials, require_match
from moepp.sweeps.launchers import LAUNCHERS
from moepp.sweeps.spec import SWEEPS, load_sweep
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

FRAGMENTS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()
}
NAMES = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
SCALES = [(name, scale) for name in NAMES for scale in load_sweep(name).scales]
ARMS = [(name, arm) for name in NAMES for arm in load_sweep(name).arms]
SIZES = {"smoke": "smoke", "laptop": "tiny", "gpu": "small"}  # by scale
TWO_STEPS = ["trainer.steps=2", "trainer.val_every=2", "trainer.checkpoint_every=2", "trainer.log_every=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


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
    trials = load_sweep("equal_compute").trials("laptop", seeds=[0])
    expected = {trial.arm: expected_ffn_per_token(trial.config.model) for trial in trials}
    assert expected.pop("vanilla") == 2.0
    assert len(expected) == 13 and expected == pytest.approx(dict.fromkeys(expected, 1.2))


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_sweep_composes_at_scale(name, scale):
    sweep = load_sweep(name)
    trials = sweep.trials(scale, seeds=[0])  # refuses arms that amount to the same run
    assert sweep.name == name and {trial.arm for trial in trials} == set(sweep.arms)
    assert all(trial.config.tags["size"] == SIZES.get(scale, trial.config.tags["size"]) for trial in trials)


@pytest.mark.parametrize(("name", "scale"), [pair for pair in SCALES if load_sweep(pair[0]).search(pair[1])])
def test_a_search_fits_at_both_ends_of_every_axis(name, scale):
    sweep = load_sweep(name)
    found = match_trials(sweep, scale, [], None, workers=1)  # composes them
    require_match(sweep.match, found.arms, found.seconds)
    assert len(found.arms) > len(sweep.arms)


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_begins_by_saying_what_it_answers(name):
    text = (SWEEPS / f"{name}.yaml").read_text()
    comment = text[: text.index("name:")]
    assert comment.startswith("# ") and "held equal" in comment.lower()
    assert {"smoke", "laptop"} <= set(load_sweep(name).scales)


def test_constant_experts_half_arms_share_their_ffn_compute():
    trials = load_sweep("constant_experts").trials("smoke", seeds=[0])  # whose size has other counts than the arms need
    expected = {trial.arm: expected_ffn_per_token(trial.config.model) for trial in trials}
    half = {arm: used for arm, used in expected.items() if arm.endswith("_half") or arm == "constant_4"}
    assert len(half) > 1 and half == pytest.approx(dict.fromkeys(half, 1.0))


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_arm_trains_two_steps(name, arm, overrides, runs):
    sweep = load_sweep(name)
    alone = replace(sweep, arms={arm: sweep.arms[arm]})
    [trial] = alone.trials("smoke", [*overrides, *TWO_STEPS, f"runs={runs}"], seeds=[0])
    trial.config.name = "arms"  # of all sweeps: a run that several of them share is trained once
    config = freeze(trial.config)
    record = train(config, run_directory(config))
    assert record.status == "done"
    assert math.isfinite(record.final()["val_loss"])
