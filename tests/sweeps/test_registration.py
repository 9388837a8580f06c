import pytest

from moepp.errors import UsageError
from moepp.records import RunRecord, read_json, write_json
from moepp.reports.registration import what_was_registered
from moepp.sweeps.reading import read_sweep
from moepp.sweeps.registration import register

SWEEP = """\
name: toy
question: Which expert?
base: [tracking=jsonl, data=tokens]
scales: {smoke: {set: [size=smoke], arms: [vanilla, moepp], seeds: 0..9}, laptop: {set: [size=tiny]}}
baseline: vanilla
arms: {vanilla: [model=vanilla], moepp: [], half: [model.balance.tau=0.5]}
contrasts: {half over whole: {arms: [half], minus: [moepp]}}
primary: {contrast: moepp, smallest: 0.02, sd: 0.01}
seeds: [0, 1]
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(old="", new=""):
        (tmp_path / "toy.yaml").write_text(SWEEP.replace(old, new) if old else SWEEP)
        return read_sweep("toy.yaml")

    return read


def registered(sweep, scale="smoke", **given):
    said = register(sweep, scale, sweep.trials(scale), **given)
    return said, read_json(sweep.folder(scale).parents[1] / f"results/toy/{scale}/plan.json")


def finished(losses, folder="runs/toy-smoke"):
    trials = [{"arm": arm, "seed": s, "path": f"{arm}{s}"} for arm, of in losses.items() for s in range(len(of))]
    for trial in trials:
        record = RunRecord(f"{folder}/{trial['path']}")
        record.path.mkdir(parents=True)
        record.log(8, {"final/val_loss": losses[trial["arm"]][trial["seed"]]})
        record.finish()
    write_json(RunRecord(folder).path / "sweep.json", {"trials": trials})
    return folder


def test_a_plan_says_what_is_compared_and_how_it_is_judged(toy):
    said, plan = registered(toy())
    assert plan["primary"] == {"name": "moepp", "arms": ["moepp"], "minus": ["vanilla"], "smallest": 0.02}
    assert plan["seeds"] == list(range(10)) and list(plan["arms"]) == ["vanilla", "moepp"] and not plan["secondary"]
    assert plan["arms"]["moepp"]["differs"]["model.gating_residual"] is True and plan["config"]["model.top_k"] == 2
    assert plan["power"]["detectable"]["primary"] == pytest.approx(0.01, rel=0.01)  # 1.00 deviations of 10 pairs
    assert "before the start" in plan["when"] and "show a difference of 0.0100" in said[1]
    assert list(registered(toy(), "laptop")[1]["secondary"]) == ["half", "half over whole"]


def test_predictions_need_no_contrast(toy):
    said, plan = registered(
        toy("primary: {contrast: moepp, smallest: 0.02, sd: 0.01}", "predictions: [The law holds.]")
    )
    assert plan["predictions"] == ["The law holds."] and not {"primary", "secondary", "test", "power"} & plan.keys()
    assert len(said) == 1 and what_was_registered(plan)[1:3] == [
        "Prediction: The law holds.", "Arms: vanilla, moepp; seeds 0 to 9.",
    ]  # fmt: skip


def test_runs_of_other_lengths_are_no_arms_of_a_plan(toy):
    plan = registered(toy("seeds: [0, 1]", "seeds: [0, 1]\nlengths: [1, 2]"))[1]
    assert list(plan["arms"]) == ["vanilla", "moepp"]


def test_a_plan_is_not_overwritten(toy):
    first = registered(toy())[1]
    said, again = registered(toy())
    assert again == first and said[0].startswith("registered already, on ")
    with pytest.raises(UsageError, match=r"registers another plan, .*differs in power.*name the sweep anew"):
        registered(toy("sd: 0.01", "sd: 0.02"))


def test_the_deviation_may_come_from_an_earlier_sweep(toy):
    folder = finished({"vanilla": [3.0, 3.1, 3.2], "moepp": [2.9, 3.02, 3.1]}, "runs/earlier-smoke")
    power = registered(toy(", sd: 0.01", ""), earlier=folder)[1]["power"]
    assert power["sd"] == pytest.approx(0.02 / 3**0.5) and power["sd_from"] == f"finished runs of {folder}"


def test_what_has_finished_is_not_registered_beforehand(toy):
    finished({"vanilla": [3.0]})
    with pytest.raises(UsageError, match=r"1 trials of runs/toy-smoke have finished already \(vanilla s0\)"):
        registered(toy())
    assert (
        registered(toy("seeds: [0, 1]", "seeds: [0, 1]\nregistered: after the start"))[1]["when"] == "after the start"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("primary: {contrast: moepp, smallest: 0.02, sd: 0.01}\n", "", "names no `primary: {contrast: ...}`"),
        (", sd: 0.01", "", "state `primary: {sd: ...}`.*or give the records of an earlier sweep"),
        ("contrast: moepp", "contrast: moep", "primary: unknown contrast 'moep'.*did you mean moepp"),
        ("smallest: 0.02", "smallest: -1", "primary"),
        ("[vanilla, moepp]", "[vanilla]", "scales: smoke: arms: moepp is missing"),
        ("0..9", "9..0", "seeds=9..0 must be"),
    ],
)
def test_what_cannot_be_registered_is_one_line(toy, old, new, message):
    with pytest.raises(UsageError, match=message) as error:
        registered(toy(old, new))
    assert "\n" not in str(error.value)
