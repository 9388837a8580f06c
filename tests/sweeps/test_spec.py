from pathlib import Path

import pytest
import yaml

from moepp.errors import UsageError
from moepp.sweeps import reading
from moepp.sweeps.budgets import budgets
from moepp.sweeps.reading import read_sweep

SWEEP = {
    "name": "toy",
    "question": "Which expert earns its place?",
    "paper": "Table 5",
    "base": ["model=moepp"],
    "scales": {
        "smoke": {"set": ["size=smoke", "trainer.steps=4"], "seeds": [0, 1]},
        "laptop": {"set": ["size=tiny", "trainer.steps=300"]},
    },
    "baseline": "vanilla",
    "arms": {
        "vanilla": {"model": {"experts": {"zero": 0, "copy": 0, "constant": 0}, "gating_residual": False}},
        "zero": ["model.experts.zero=1", "model.experts.copy=0", "model.experts.constant=0"],
    },
    "seeds": [0, 1, 2],
}


@pytest.fixture
def write(tmp_path):
    """Writes the sweep above with changes (None removes a key) and returns its path."""

    def write(**changes):
        path = tmp_path / "toy.yaml"
        content = {key: value for key, value in (SWEEP | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    return write


LR = {"optim.lr": {"float": [1e-3, 1e-2]}}


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({}, ["seed=3"], "^seed=3 has no effect in a sweep: name its seeds with --seeds"),
        ({}, ["name=mine"], "^name=mine has no effect in a sweep: its runs lie below its own name"),
        ({"base": ["model=moepp", "seed=3"]}, [], r"toy\.yaml: base: seed=3 has no effect in a sweep"),
        (
            {"space": {"grid": {"optim.lr": [0.1, 0.2]}}, "pruner": {"successive_halving": {"first": 4, "factor": 2}}},
            ["trainer.val_every=4"],
            "pruner: first=4 must lie before the last of trainer.steps=4, or nothing is pruned",
        ),
    ],
)
def test_what_a_sweep_would_pass_over_is_refused(write, changes, extra, message):
    with pytest.raises(UsageError, match=message):
        read_sweep(write(**changes)).trials("smoke", extra)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "sqlite:///x.db"}, "storage=sqlite:///x.db is of a search: leave it out"),
        ({"scales": {"smoke": {"proposals": 3}}}, "scales.smoke.proposals=3 is of a search"),
        ({"lengthened": ["zero"]}, r"lengthened=\['zero'\] needs lengths"),
    ],
)
def test_keys_of_other_kinds_of_sweeps_are_refused(write, changes, message):
    with pytest.raises(UsageError, match=message):
        read_sweep(write(**changes))


def test_an_axis_of_a_search_is_refused_where_nothing_reads_it_wherever_the_others_lead(write):
    def ends(**axes):
        space = {"tpe": {"n": 2, "keys": {"model.top_p": {"float": [0.2, 0.5]}, **axes}}}
        base = ["model=moepp", "model.capacity_factor=null"]
        return read_sweep(write(base=base, space=space)).extremes("smoke")

    with pytest.raises(UsageError, match=r"space\.tpe, arm vanilla: model\.top_p=0\.2 has no effect"):
        ends(**LR)
    assert len(ends(**{"model.selection": {"choice": ["top_k", "top_p"]}})) == 8


def test_all_arms_of_the_first_seed_come_first(write):
    trials = read_sweep(write()).trials("laptop")
    assert [(t.seed, t.arm) for t in trials] == [(s, arm) for s in (0, 1, 2) for arm in ("vanilla", "zero")]


def test_arms_may_be_mappings_or_overrides(write):
    vanilla, zero = read_sweep(write()).trials("smoke", seeds=[5])
    assert (vanilla.config.model.experts.zero, zero.config.model.experts.zero) == (0, 1)
    assert (vanilla.config.model.gating_residual, zero.config.model.gating_residual) == (False, True)
    assert vanilla.config.seed == zero.config.seed == 5
    assert vanilla.config.trainer.steps == zero.config.trainer.steps == 4


def test_a_scale_may_have_seeds_of_its_own_and_the_caller_wins(write):
    sweep = read_sweep(write())
    assert [t.seed for t in sweep.trials("smoke")] == [0, 0, 1, 1]
    assert [t.seed for t in sweep.trials("smoke", seeds=[7])] == [7, 7]


def test_overrides_of_the_caller_win_over_the_scale(write):
    assert read_sweep(write()).trials("smoke", ["trainer.steps=9"])[0].config.trainer.steps == 9


def test_trials_are_named_and_tagged(write, tmp_path):
    trial = read_sweep(write()).trials("smoke", [f"runs={tmp_path}"])[1]
    assert trial.directory.parent == tmp_path / "toy-smoke"
    assert trial.config.tags == {
        "sweep": "toy-smoke", "experiment": "toy", "scale": "smoke", "size": "smoke",
        "arm": "zero", "baseline": "vanilla", "paper_table": "Table 5",
    }  # fmt: skip


def test_the_digest_of_the_data_is_part_of_the_identity(write):
    trial = read_sweep(write()).trials("smoke")[0]
    before = trial.directory
    trial.config.data.digest = "0123456789abcdef"
    assert trial.directory != before


def test_arms_that_amount_to_the_same_run_are_refused(write):
    arms = SWEEP["arms"] | {"one_zero": {"model": {"experts": {"zero": 1, "copy": 0, "constant": 0}}}}
    with pytest.raises(UsageError, match="arms zero and one_zero are the same run"):
        read_sweep(write(arms=arms)).trials("smoke")


def test_a_space_adds_arms(write):
    space = {"grid": {"model": ["vanilla", "moepp"], "optim.lr": [0.001, 0.002]}}
    trials = read_sweep(write(arms=None, space=space, baseline="model=vanilla,lr=0.001")).trials("smoke", seeds=[0])
    found = [(t.arm, t.config.model.gating_residual, t.config.optim.lr) for t in trials]
    assert found[0] == ("model=vanilla,lr=0.001", False, 0.001)
    assert found[3] == ("model=moepp,lr=0.002", True, 0.002)
    assert len(read_sweep(write(space=space)).trials("smoke", seeds=[0])) == 6  # beside the two named ones


def test_a_point_of_the_space_may_not_hide_an_arm(write):
    arms = SWEEP["arms"] | {"top_k=1": ["model.top_k=1"]}
    with pytest.raises(UsageError, match="arm top_k=1 is also a point of the space"):
        read_sweep(write(arms=arms, space={"grid": {"model.top_k": [1, 2]}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": None}, "question is missing"),
        ({"arms": None}, "arms is missing"),
        ({"baseline": "vanila"}, "unknown baseline 'vanila'; choose from vanilla, zero; did you mean vanilla"),
        ({"seed": [0]}, "unknown key seed; did you mean seeds"),
        ({"match": "speed"}, "match=speed must be one of 'tokens'"),
        ({"seeds": ["many"]}, r"seeds=\['many'\] must be text or a list, each a whole number"),
        ({"contrasts": {"a $x$": {"arms": ["zero"], "minus": ["vanilla"]}}}, r"contrasts='a \$x\$': a label .* no \$"),
        ({"contrasts": {"a\nb": {"arms": ["zero"], "minus": ["vanilla"]}}}, "contrasts=.* must be one line"),
        ({"seeds": "0..99999999999"}, "seeds=0..99999999999 must be a list .* of at most 10,000"),
        (
            {"scales": {"smoke": {"seeds": "5..2"}}},
            "scales.smoke.seeds=5..2 must be a list of whole numbers or a range",
        ),
        ({"scales": {"smoke": {"sets": []}}}, "scales.smoke.sets"),
        ({"retries": -1}, "retries=-1 must not be negative"),
        ({"space": {"cma": {}}}, "space must hold one of grid, random and tpe"),
        ({"pruner": {"successive_halving": {"first": 2, "factor": 2}}}, "pruner needs a space"),
        ({"space": {"grid": {"seed": [1]}}, "pruner": {"median": 1}}, "pruner must be {successive_halving"),
        ({"arms": {"vanilla": 3}}, "arm vanilla must be a list of overrides or a mapping"),
        ({"arms": {"vanilla": [], "a+b": ["top_k=1"], "a_b": []}}, r"the figures of arms a\+b and a_b alike; rename"),
        ({"lengths": [2], "lengthened": ["zeros"]}, "lengthened: unknown arm 'zeros'; .* did you mean zero"),
        (
            {"lengths": [2], "space": {"tpe": {"n": 1, "keys": {"optim.lr": {"float": [0.1, 0.2]}}}}},
            "lengths=.* are of named arms; a search has none",
        ),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it_once(write, changes, message):
    path = str(write(**changes))
    with pytest.raises(UsageError, match=message) as error:
        read_sweep(path)
    assert "\n" not in str(error.value) and str(error.value).count(path) == 1


@pytest.mark.parametrize(
    ("changes", "scale", "message"),
    [
        ({}, "smok", "unknown scale 'smok'; choose from smoke, laptop; did you mean smoke"),
        ({"seeds": [0, 1, 1]}, "laptop", r"seeds \[0, 1, 1\] of sweep toy repeat"),
        ({"arms": {"vanilla": ["model.experts.zeros=1"]}}, "smoke", "did you mean model.experts.zero"),
        ({"arms": {"vanilla": {"model": {"experts": {"zeros": 1}}}}}, "smoke", "did you mean model.experts.zero"),
    ],
)
def test_wrong_trials_are_one_line(write, changes, scale, message):
    with pytest.raises(UsageError, match=message) as error:
        read_sweep(write(**changes)).trials(scale)
    assert "\n" not in str(error.value)


def test_sweeps_are_found_by_name(write, tmp_path, monkeypatch):
    write()
    monkeypatch.setattr(reading, "SWEEPS", tmp_path)
    assert read_sweep("toy").paper == "Table 5"
    with pytest.raises(UsageError, match="unknown sweep 'tou'; choose from toy; did you mean toy"):
        read_sweep("tou")


def test_sweeps_of_ones_own_are_added_and_come_first(write, tmp_path, monkeypatch):
    (tmp_path / "sweeps").mkdir()
    for name in ("toy", "tau"):
        Path(write()).rename(tmp_path / f"sweeps/{name}.yaml")
    monkeypatch.chdir(tmp_path)
    assert read_sweep("toy").name == read_sweep("tau").name == "toy" and read_sweep("top_k").name == "top_k"
    with pytest.raises(
        UsageError, match=r"unknown sweep 'tou'; choose from .*tau, tau_by_type, top_k, toy, .*did you mean toy"
    ):
        read_sweep("tou")


def test_anchors_and_dotted_keys_work(write):
    arms = {"vanilla": [["optim.lr=1e-3"], [["optim.beta1=0.8"]]], "zero": {"optim.lr": 1e-2}}
    vanilla, zero = read_sweep(write(arms=arms)).trials("smoke", seeds=[0])
    assert (vanilla.config.optim.lr, vanilla.config.optim.beta1, zero.config.optim.lr) == (1e-3, 0.8, 1e-2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("vanilla:", "null:", "line .*: the name null is no string; write it in quotes"),
        ("vanilla:", "1.10:", "line .*: the name 1.10 is no string"),
        ("- model=moepp", "- [model=moepp]", "base=.* must be a single str"),
        ("base:\n- model=moepp", "base: {model: moepp}", "base=.* must be a list"),
        ("- model.experts.zero=1", "- 3", "arm zero must be a list of overrides"),
        ("- model.experts.zero=1", "- optim.lr=nan", "arm zero: optim.lr=nan must be positive"),
        ("- model.experts.zero=1", "- model.top_k=1", "arm zero: model.gate=released"),
        ("model=moepp", "optim.eps=-1", "base: optim.eps=-1.0 must not be negative"),
        ("trainer.steps=4", "trainer.steps=0", "scale smoke: trainer.steps=0 must be at least 1"),
        ("name: toy", "name: toy\nretries: -1", "retries=-1 must not be negative"),
        ("name: toy", "name: toy\nfile: x", "unknown key file"),
        ("- model.experts.zero=1", "- optim.lr: ???", "optim.lr=.* stands for a value that is missing"),
        ("- model.experts.zero=1", "- size: tiny", r"size chooses a fragment and is no key: .*\[size=NAME\]"),
        (
            "- model.experts.zero=1",
            "- optim.name=SGD\n  - optim.options.momentum=3",
            "optim.options.momentum=3 must not",
        ),
    ],
)
def test_what_is_wrong_is_said_with_file_and_place(write, old, new, message):
    path = Path(write())
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UsageError, match=message) as caught:
        read_sweep(str(path)).trials("smoke")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_seeds_that_no_generator_takes_are_refused_and_the_command_is_not_the_files_fault(write):
    sweep = read_sweep(write())
    with pytest.raises(UsageError, match="seed=4294967296 must not be negative, and at most"):
        sweep.trials("smoke", seeds=[2**32])
    with pytest.raises(UsageError, match=r"^unknown key optim.rate"):
        sweep.trials("smoke", ["optim.rate=1"])


def test_a_length_beyond_all_steps_is_refused(write):
    with pytest.raises(UsageError, match=r"lengths: 1e\+09 times the steps of vanilla=4000000000 must be .* at most"):
        read_sweep(write(lengths=[1e9])).trials("smoke")


def test_what_a_run_of_that_length_would_be_refused_is_refused_of_a_length(write):
    sweep = read_sweep(write(lengths=[0.5], base=[*SWEEP["base"], "trainer.average_checkpoints=1"]))
    given = ["trainer.steps=8", "optim.warmup_steps=1"]
    with pytest.raises(UsageError, match=r"^lengths: vanilla@0\.5: .*average_checkpoints=1 is more than .*=4 has"):
        sweep.trials("smoke", given)
    sweep.trials("smoke", [*given, "trainer.steps=10"])


def test_lengths_train_the_baseline_to_other_ends_and_are_no_arms(write):
    sweep = read_sweep(write(lengths=[0.5, 1, 1.5], base=[*SWEEP.get("base", []), "optim.schedule=wsd"]))
    scale = next(iter(sweep.scales))
    trials = sweep.trials(scale)
    longer = [trial for trial in trials if trial.lengthened]
    own = next(trial for trial in trials if trial.arm == sweep.baseline)
    assert {trial.arm for trial in longer} == {f"{sweep.baseline}@0.5", f"{sweep.baseline}@1.5"}
    assert longer[0].config.trainer.steps == round(1.5 * own.config.trainer.steps)
    assert set(own.config.trainer.keep_at) < set(longer[0].config.trainer.keep_at)  # the longest is everyone's trunk
    assert not set(budgets(trials)) & {trial.arm for trial in longer}
