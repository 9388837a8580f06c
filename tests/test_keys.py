from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from registered import forgotten

from moepp import register
from moepp.config import compose
from moepp.errors import UsageError
from moepp.keys import describe_keys, keys, meanings
from moepp.layers.bounds import Range
from moepp.training.settings import RunConfig


@dataclass
class Part:
    beside: int = 1  # said beside it,
    # and below
    both: int = 2  # its own
    # said above, as nothing is beside it
    above: float | None = None
    silent: str = ""
    wrapped: dict[str, str] = field(
        default_factory=dict,  # within
    )

    def method(self) -> None:
        """A method's comments are its own."""  # not this


@dataclass
class Inheriting(Part):
    own: Literal["", "a"] = ""  # mine
    last: Annotated[int, Range(1, 9)] = 1  # the last


def test_a_fields_comments_are_its_meaning():
    assert meanings(Part) == {
        "beside": "said beside it, and below", "both": "its own", "above": "said above, as nothing is beside it",
        "wrapped": "within",
    }  # fmt: skip
    assert meanings(Inheriting) == {**meanings(Part), "own": "mine", "last": "the last"}


def test_kinds_are_said_in_words():
    kinds = {key.name: key.kind for key in keys(Inheriting)}
    assert kinds["above"] == "number; or null"
    assert kinds["own"] == "one of '', a"
    assert kinds["last"] == "whole number; must be at least 1, and at most 9"
    assert kinds["wrapped"] == "mapping of names to: text"


def test_every_key_of_a_run_has_a_meaning():
    assert [key.name for key in keys(RunConfig) if not key.meaning] == []


def test_a_key_is_found_by_its_group_and_by_its_last_name():
    config = compose(RunConfig, ["size=tiny"])
    assert describe_keys(config, "trainer.steps")[0] == "trainer.steps=360 (the schema's default: 1000)"
    assert describe_keys(config, "lr")[0].startswith("optim.lr=")
    group = [line for line in describe_keys(config, "model.balance") if not line.startswith(" ")]
    assert len(group) > 5 and all(line.startswith("model.balance.") for line in group)
    assert max(map(len, describe_keys(config))) <= 120
    assert "tiny" in " ".join(describe_keys(config, "size"))


def test_types_with_a_key_of_their_own_are_no_choice_among_others():
    [others] = [key for key in keys(RunConfig) if key.name == "model.experts.others"]
    assert others.choices == ("vector", "scaled_copy")


def test_a_key_that_is_none_gets_the_nearest():
    with pytest.raises(UsageError, match=r"^unknown key model\.tau; did you mean model\.balance\.tau\?$"):
        describe_keys(compose(RunConfig, []), "model.tau")


def test_parts_of_plugins_are_among_the_choices():
    with forgotten():
        register.router("of_mine")(lambda config, first: None)
        assert "of_mine" in " ".join(describe_keys(compose(RunConfig, []), "model.router"))
