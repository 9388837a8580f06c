import re
from dataclasses import dataclass, field, make_dataclass
from typing import Literal

import pytest
from omegaconf import OmegaConf

from moepp import typed
from moepp.config import compose, differences, flatten, identity, load, save
from moepp.errors import UsageError
from moepp.training.settings import NOT_IDENTITY, OptimConfig, RunConfig, TrainerConfig


@dataclass
class Part:
    width: int = 1
    form: Literal["a", "b"] = "a"
    share: float | None = None

    def __post_init__(self):
        if self.width < 0:
            raise ValueError(f"part.width={self.width} must not be negative")


@dataclass
class Whole:
    part: Part = field(default_factory=Part)
    names: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def conf(tmp_path):
    (tmp_path / "base.yaml").write_text("fragments: {size: small, kind: plain}\npart: {width: 2}\n")
    for name, text in {"size/small": "part: {width: 3}", "size/big": "part: {width: 9}", "kind/plain": "{}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "kind/b.yaml").write_text("part: {form: b, width: 5}\ntags: {kind: b}")
    return tmp_path


def test_a_fragment_chooses_others_unless_the_command_line_does(conf):
    (conf / "recipe").mkdir()
    (conf / "recipe/r.yaml").write_text("fragments: {size: big}\ntags: {recipe: r}")
    assert compose(Whole, ["recipe=r"], conf) == Whole(Part(9), tags={"recipe": "r"})
    assert compose(Whole, ["recipe=r", "size=small"], conf).part.width == 3
    (conf / "recipe/r.yaml").write_text("part: {width: 4}")
    assert compose(Whole, ["recipe=r", "size=big"], conf).part.width == 4  # a group that base.yaml lacks comes last


def test_fragments_of_ones_own_are_added_and_come_first(tmp_path, monkeypatch):
    (tmp_path / "conf/size").mkdir(parents=True)
    (tmp_path / "conf/size/mine.yaml").write_text("model: {dim: 48, heads: 3}")
    (tmp_path / "conf/size/tiny.yaml").write_text("model: {dim: 96, heads: 3}")
    (tmp_path / "conf/base.yaml").write_text("nothing: of ours")  # of another program, perhaps
    monkeypatch.chdir(tmp_path)
    assert compose(RunConfig, ["size=mine"]).model.dim == 48
    assert compose(RunConfig, ["size=tiny"]).model.dim == 96
    assert compose(RunConfig, ["size=smoke"]).tags["size"] == "smoke"
    with pytest.raises(UsageError, match=r"size=huge: no such fragment; choose from .*mine, mini, .*small"):
        compose(RunConfig, ["size=huge"])


@dataclass
class WiderPart(Part):
    depth: int = 4


@dataclass
class WiderWhole(Whole):
    part: WiderPart = field(default_factory=WiderPart)
    options: dict[str, float] = field(default_factory=dict)
    parts: dict[str, WiderPart] = field(default_factory=dict)


def test_a_key_that_the_schema_gains_changes_no_identity():
    for values in ({}, {"names": ["x"]}, {"tags": {"a": "b"}}):
        assert identity(Whole(Part(3), **values), []) == identity(WiderWhole(WiderPart(3), **values), [])
    assert identity(WiderWhole(WiderPart(3, depth=5)), []) != identity(Whole(Part(3)), [])


def test_a_key_that_run_configs_gain_changes_no_identity():
    wider = make_dataclass("Wider", [("momentum", float, 0.9)], bases=(OptimConfig,))
    schema = make_dataclass("WiderRun", [("optim", wider, field(default_factory=wider))], bases=(RunConfig,))
    words = ["size=smoke", "model=vanilla"]
    assert identity(compose(schema, words), NOT_IDENTITY) == identity(compose(RunConfig, words), NOT_IDENTITY)
    other = compose(schema, [*words, "optim.momentum=0.8"])
    assert identity(other, NOT_IDENTITY) != identity(compose(RunConfig, words), NOT_IDENTITY)


def test_everything_that_is_no_default_is_told_apart():
    configs = [
        WiderWhole(),
        WiderWhole(names=["x"]),
        WiderWhole(names=["x", "y"]),
        WiderWhole(tags={"a": "b"}),
        WiderWhole(options={"alpha": 0.0}),
        WiderWhole(options={"alpha": 0.1}),
        WiderWhole(parts={"a": WiderPart()}),  # there, although all of it is default
        WiderWhole(parts={"b": WiderPart()}),
        WiderWhole(parts={"a": WiderPart(2)}),
        WiderWhole(WiderPart(share=0.0)),
        WiderWhole(WiderPart(width=0)),
    ]
    assert len({identity(config, []) for config in configs}) == len(configs)
    narrow = WiderWhole(parts={"a": Part(2)})  # as a source of a mixture was before it had a key more
    assert identity(narrow, []) == identity(WiderWhole(parts={"a": WiderPart(2)}), [])


def test_the_identity_of_a_run_is_the_same_tomorrow():
    """Another one orphans every finished run and makes every begun sweep start afresh. Change this literal only when
    that is meant, and say so in the changelog.
    """
    assert identity(compose(RunConfig, ["size=smoke"]), NOT_IDENTITY) == "0308e44d8347"


def test_what_a_saved_config_says_otherwise_is_named():
    saved = {"part": {"width": 3, "form": "a", "gone": 1}, "names": ["x"], "tags": {"a": "b"}}
    now = Whole(Part(4), ["x", "y"], {"c": "d"})
    assert differences(saved, now, []) == {
        "part.width": (3, 4), "names": (["x"], ["x", "y"]), "tags.a": ("b", None), "tags.c": (None, "d"),
    }  # fmt: skip
    assert list(differences(saved, now, ["tags", "part.width"])) == ["names"]
    assert differences({"part": {}}, Whole(), []) == {}  # what it does not say had the default


def test_a_default_that_changes_is_seen_where_the_identity_is_the_same(tmp_path):
    wider = make_dataclass("Wider", [("width", int, 7)], bases=(Part,))
    schema = make_dataclass("Later", [("part", wider, field(default_factory=wider))], bases=(Whole,))
    save(Whole(), tmp_path / "config.yaml")
    assert identity(schema(), []) == identity(Whole(), [])
    assert differences(OmegaConf.load(tmp_path / "config.yaml"), schema(), []) == {"part.width": (1, 7)}


def test_later_layers_win_and_the_result_is_the_dataclass(conf):
    assert compose(Whole, [], conf) == Whole(Part(3))
    assert compose(Whole, ["size=big"], conf).part == Part(9)
    assert compose(Whole, ["kind=b", "size=big"], conf).part == Part(5, "b")  # base.yaml's order of groups, not ours
    assert compose(Whole, ["part.width=7", "kind=b"], conf).part.width == 7  # keys win over fragments
    assert compose(Whole, [{"part": {"width": 8}}, "part.share=0.5"], conf).part == Part(8, share=0.5)
    assert compose(Whole, ["part.share=null", "tags.any=thing", "names=[x, y]"], conf) == Whole(
        Part(3), ["x", "y"], {"any": "thing"}
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("part.widht=1", "unknown key part.widht; did you mean part.width?"),
        ("siez=big", "unknown key siez; did you mean size?"),
        ("size=huge", "size=huge: no such fragment; choose from big, small"),
        ("part.width=wide", "part.width=wide must be a whole number"),
        ("part.form=c", "part.form=c must be one of 'a', 'b'"),
        ("part=3", "part is a group of keys; set one of part.width, part.form, part.share"),
        ("part.width=-1", "part.width=-1 must not be negative"),
        ("nonsense", "'nonsense' is not an override; write key=value, for example model.top_k=2"),
        ("part.width=[", "cannot read 'part.width=['"),
    ],
)
def test_every_mistake_is_one_helpful_line(conf, argument, message):
    with pytest.raises(UsageError) as caught:
        compose(Whole, [argument], conf)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_broken_fragment_names_its_file(conf):
    (conf / "size/small.yaml").write_text("part: {width: [")
    with pytest.raises(UsageError, match=r"cannot read .*small\.yaml"):
        compose(Whole, [], conf)


def test_a_frozen_config_loads_as_it_was(tmp_path):
    config = compose(RunConfig, ["size=smoke", "model=vanilla", "tags.arm=x", "model.logits_norm=1.5"])
    save(config, tmp_path / "config.yaml")
    assert load(RunConfig, tmp_path / "config.yaml") == config
    with pytest.raises(UsageError, match="no config file"):
        load(RunConfig, tmp_path / "other.yaml")


def test_identity_changes_with_what_changes_the_result_and_with_nothing_else():
    base = identity(compose(RunConfig, []), NOT_IDENTITY)
    for same in ("runs=elsewhere", "tracking=jsonl", "tags.arm=x", "name=other", "data.cache=x", "trainer.threads=4"):
        assert identity(compose(RunConfig, [same]), NOT_IDENTITY) == base
    for other in (
        "seed=1",
        "model.top_k=3",
        "data.digest=ab",
        "optim.lr=1",
        "trainer.steps=70",
        "trainer.accumulate=2",
    ):
        assert identity(compose(RunConfig, [other]), NOT_IDENTITY) != base


def test_nothing_that_is_no_key_hides_in_the_list_of_keys_outside_the_identity():
    keys = flatten(RunConfig())
    assert [name for name in NOT_IDENTITY if not any(k == name or k.startswith(f"{name}.") for k in keys)] == []


def test_the_vanilla_fragment_is_moepp_with_its_switches_off():
    off = ["model.experts.zero=0", "model.experts.copy=0", "model.experts.constant=0", "model.gating_residual=false"]
    assert compose(RunConfig, ["model=vanilla"]) == compose(RunConfig, ["model=moepp", *off])


IMPOSSIBLE = [  # each trained garbage to its end, or ended in a traceback
    "optim.lr=nan", "optim.lr=inf", "optim.lr=-1", "optim.final_lr_share=-1", "optim.weight_decay=-1",
    "optim.grad_clip=-1", "optim.grad_clip=nan", "optim.warmup_steps=-5", "optim.beta1=-1", "optim.beta2=1.5",
    "optim.eps=-1", "model.hidden=0", "model.init_std=0", "model.init_std=-1", "model.norm_eps=1e30",
    "model.norm_eps=-1", "model.rope_theta=0", "model.balance.beta=1e30", "model.balance.beta=nan",
    "model.balance.control_rate=nan", "model.dim=0", "model.heads=0", "model.kv_heads=0",
    "model.capacity_factor=.inf", "model.capacity_factor=nan", "seed=-1", "seed=99999999999", "trainer.threads=-1",
    "trainer.accelerator=mps", "trainer.accelerator=foo", "trainer.stop_s=.nan", "data.val_share=nan",
    "data.batch_size=99999999999", "cloze.points=-1", "strategy.timeout_s=inf", "data.hub.max_documents=-1",
]  # fmt: skip


@pytest.mark.parametrize("word", IMPOSSIBLE)
def test_numbers_and_choices_without_sense_are_refused_by_their_whole_key(word):
    key, _, value = word.partition("=")
    with pytest.raises(UsageError) as caught:
        compose(RunConfig, [word])
    assert re.match(rf"{re.escape(key)}(=|: .*'{value}')", str(caught.value)), caught.value
    assert re.search("must|expected one of", str(caught.value))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.top_k=1"], "model.gate=released .* learns nothing: set model.gate=softmax, or model.top_k above 1"),
        (["model.top_k=1", "model.gate=renormalized"], "model.gate=renormalized divides a single gate"),
        (["model.experts={ffn: 1, zero: 2, copy: 0, constant: 0}"], "model.gate=released divides a single gate"),
        (["trainer.steps=20"], "optim.warmup_steps=30 is more than trainer.steps=20.* set it to 20 at most"),
        (["model=vanilla", "model.experts.ffn=1", "model.logits_norm=1", "model.top_k=1"], "logits_norm=1.0 needs two"),
    ],
)
def test_what_cannot_learn_is_refused_with_the_way_out(words, message):
    with pytest.raises(UsageError, match=message):
        compose(RunConfig, words)


def test_what_can_learn_is_not_refused(tmp_path):
    compose(RunConfig, ["model.top_k=1", "model.gate=softmax"])
    compose(RunConfig, ["model=dense", "model.top_k=1"])  # has no router
    compose(RunConfig, ["trainer.steps=1"])  # has no schedule
    save(RunConfig(trainer=TrainerConfig(steps=9)), tmp_path / "config.yaml")  # the record of a finished run
    assert load(RunConfig, tmp_path / "config.yaml").optim.warmup_steps == 100


def test_a_value_may_refer_to_another_key_and_to_nothing_else(monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    assert compose(RunConfig, ["data.path=${data.cache}/x"]).data.path == ".cache/x"
    for word in ("tags.a=${oc.env:TOKEN}", "optim.lr=${oc.env:TOKEN}", "tags.a=${${x}}"):
        with pytest.raises(UsageError, match=r"a value may refer to another key") as caught:
            compose(RunConfig, [word])
        assert "secret" not in str(caught.value)


def test_a_fragment_lies_in_its_folder(tmp_path):
    with pytest.raises(UsageError, match="no such fragment"):
        compose(RunConfig, ["size=../model/moepp"])


def test_many_configs_are_made_value_by_value(monkeypatch):
    """OmegaConf joins a whole config in tens of milliseconds; a sweep makes a thousand that differ in one value."""
    merge, merges = OmegaConf.merge, []
    monkeypatch.setattr(OmegaConf, "merge", lambda *configs: (merges.append(1), merge(*configs))[1])
    same = ["size=smoke", "data.path=texts"]  # a path, or a list of them
    first = compose(RunConfig, [*same, "optim.lr=0.0011"])
    merges.clear()
    for number in range(20):
        found = compose(RunConfig, [*same, f"optim.lr=0.00{20 + number}"])
        assert found.optim.lr == pytest.approx(0.002 + 0.0001 * number)
    assert not merges and found.model == first.model and found.model is not first.model


def test_values_are_made_as_omegaconf_makes_them(monkeypatch):
    words = ["size=smoke", "optim.lr=1", "data.path=1", "tags.a=1", "optim.schedule=wsd", "trainer.keep_at=[3]"]
    found = compose(RunConfig, words)
    monkeypatch.setattr(typed, "make", None)
    assert repr(found) == repr(compose(RunConfig, words))
