from dataclasses import dataclass, field
from typing import Literal

import pytest

from moepp.config import compose, flatten, identity, load, save
from moepp.errors import UsageError
from moepp.training.settings import NOT_IDENTITY, RunConfig


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


def test_an_empty_mapping_is_no_part_of_an_identity():
    assert identity(Whole(Part()), ["part"]) == identity(Whole(Part(), tags={}), ["part", "tags"])
    assert identity(Whole(Part(), tags={"a": "b"}), ["part"]) != identity(Whole(Part()), ["part"])


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
        ("part.width=wide", "part.width: Value 'wide' of type 'str' could not be converted to Integer"),
        ("part.form=c", "part.form: Invalid value 'c', expected one of ['a', 'b']"),
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
    for other in ("seed=1", "model.top_k=1", "data.digest=ab", "optim.lr=1", "trainer.steps=7", "trainer.accumulate=2"):
        assert identity(compose(RunConfig, [other]), NOT_IDENTITY) != base


def test_nothing_that_is_no_key_hides_in_the_list_of_keys_outside_the_identity():
    keys = flatten(RunConfig())
    assert [name for name in NOT_IDENTITY if not any(k == name or k.startswith(f"{name}.") for k in keys)] == []


def test_the_vanilla_fragment_is_moepp_with_its_switches_off():
    off = ["model.experts.zero=0", "model.experts.copy=0", "model.experts.constant=0", "model.gating_residual=false"]
    assert compose(RunConfig, ["model=vanilla"]) == compose(RunConfig, ["model=moepp", *off])
