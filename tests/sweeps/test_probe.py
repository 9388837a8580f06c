import pytest
from run_fake_sweep import sweep

from moepp.errors import UsageError
from moepp.records import read_json
from moepp.sweeps import commands, probe
from moepp.sweeps.budgets import match_trials, require_match
from moepp.sweeps.launchers.call import SweepCall
from moepp.sweeps.probe import beyond_this_machine, give_equal_seconds, step_seconds


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.02)


@pytest.fixture
def measured(monkeypatch):
    """In place of real steps: tau 0.1 trains twice as fast as the others. Counts what is measured."""
    asked = []

    def measure(configs, threads, known):
        asked.append(len(configs))
        times = {key: 0.1 if config.model.balance.tau < 0.5 else 0.2 for key, config in configs.items()}
        return {"threads": threads, "seconds": known | times}

    monkeypatch.setattr(probe, "_measure", measure)
    return asked


def timed(match="wallclock", steps=100, **arms):
    toy = sweep(match=match, **(arms or {"slow": ["model=moepp"], "fast": ["model=moepp", "model.balance.tau=0.1"]}))
    return toy, ["trainer.accelerator=cpu", f"trainer.steps={steps}"]


@pytest.mark.parametrize("model", ["moepp", "top_p"])
def test_a_probe_times_real_steps_once(tmp_path, model):
    toy, extra = timed(vanilla=["model=vanilla"], other=[f"model={model}"])
    trials = toy.trials("smoke", extra)
    seconds = step_seconds(tmp_path, trials, threads=1)
    assert seconds.keys() == {"vanilla", "other"} and all(0 < value < 5 for value in seconds.values())
    kept = read_json(tmp_path / "probe.json")
    assert kept["threads"] == 1 and kept["hardware"] and len(kept["spread"]) == 2
    assert step_seconds(tmp_path, trials, threads=1) == seconds and read_json(tmp_path / "probe.json") == kept


def test_arms_that_cost_the_same_share_a_probe_and_the_rest_is_estimated(tmp_path, measured):
    rates = {f"lr{i}": [f"optim.lr={i + 1}e-4"] for i in range(5)}
    taus = {f"tau{i}": [f"model.balance.tau=0.{i + 3}"] for i in range(5)}
    toy, extra = timed(**rates, **taus)
    seconds = step_seconds(tmp_path, toy.trials("smoke", extra), threads=1, most=3)
    assert measured == [3] and len(set(list(seconds.values())[:5])) == 1
    assert seconds["tau4"] == pytest.approx((0.2 + 0.1 + 0.2) / 3)  # every other one: of tau 0.75, 0.4 and 0.6


def test_a_step_for_a_gpu_is_not_tried_on_a_cpu_and_the_plan_is_made_without_its_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "_measure", lambda *_: pytest.fail("a step of a large model is timed"))
    call = SweepCall("tau", "gpu", overrides=("data.corpus=sotu", "trainer.accelerator=cpu", f"runs={tmp_path}"))
    commands.plan(call)
    assert "\ntime: not known here: its steps are for a GPU, and none is visible" in capsys.readouterr().out
    matched = match_trials(sweep(), "smoke", timed()[1], None, workers=1)
    assert not beyond_this_machine(matched.trials, {arm: b.flops_per_token for arm, b in matched.arms.items()})


def test_arms_get_the_steps_that_fit_into_the_baselines_time(tmp_path, measured):
    toy, extra = timed()
    matched = match_trials(toy, "smoke", [*extra, f"runs={tmp_path}"], None, workers=1)
    assert {trial.arm: trial.config.trainer.steps for trial in matched.trials} == {"slow": 100, "fast": 200}
    assert matched.seconds == pytest.approx({"slow": 20.0, "fast": 20.0})
    assert matched.arms["fast"].tokens == 2 * matched.arms["slow"].tokens
    require_match("wallclock", matched.arms, matched.seconds)
    match_trials(toy, "smoke", [*extra, f"runs={tmp_path}"], None, workers=1)
    assert measured == [2]


def test_too_few_steps_to_match_are_refused_with_the_ends(tmp_path):
    toy, extra = timed(steps=8)
    trials = toy.trials("smoke", extra)
    give_equal_seconds(trials, "slow", {"slow": 0.2, "fast": 0.19})
    assert [trial.config.trainer.steps for trial in trials] == [8, 8]
    matched = match_trials(timed(match="tokens")[0], "smoke", extra, None, workers=1)
    ends = r"differ by 5.3% in wallclock \(1.52 of fast to 1.6 of slow\), .* train more steps"
    with pytest.raises(UsageError, match=ends):
        require_match("wallclock", matched.arms, {"slow": 1.6, "fast": 1.52})


def test_steps_of_an_arms_own_are_refused(tmp_path, measured):
    toy, _ = timed(slow=["model=moepp"], own=["trainer.steps=50"])
    with pytest.raises(UsageError, match="arm own sets its own"):
        match_trials(toy, "smoke", [f"runs={tmp_path}"], None, workers=1)


def test_a_search_has_no_wallclock_to_match(tmp_path, measured):
    toy, extra = timed()
    toy.space = {"tpe": {"n": 1, "keys": {"optim.lr": {"float": [0.1, 1]}}}}
    with pytest.raises(UsageError, match="a search has none"):
        match_trials(toy, "smoke", [*extra, f"runs={tmp_path}"], None, workers=1)
