from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from moepp import words
from moepp.config import compose
from moepp.errors import UsageError
from moepp.training.settings import RunConfig
from moepp.words import Plain, meant, read


@dataclass
class Part:
    word: str = ""
    rate: float = 1.0
    perhaps: str | None = None
    one_or_more: str | list[str] = ""
    choice: Literal["none", "1"] = "none"


@dataclass
class Whole:
    part: Part = field(default_factory=Part)
    parts: dict[str, Part] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


ODD = [
    "no",
    "on",
    "12:30",
    "007",
    "3.10",
    "1_5",
    "1234e56",
    "x #1",
    "a: b",
    "*.txt",
    "[x].txt",
    " ",
    "'q'",
    "null",
    "-",
]


@pytest.mark.parametrize("word", ODD)
def test_where_the_schema_says_str_the_word_is_the_value(word):
    for key in ("part.word", "tags.a", "tags.a.b", "parts.p.word", "part.one_or_more"):
        layer = meant(words.layer(key, word, Whole), Whole)
        *groups, name = key.split(".", 1) if key.startswith("tags") else key.split(".")
        for group in groups:
            layer = layer[group]
        assert layer == {name: word}


@pytest.mark.parametrize("word", ["no", "12:30", "007", "3.10", "1234e56", "4e10293", "true", "~", "2024-01-01", "1_5"])
def test_a_file_keeps_words_as_well(word):
    text = f"part: {{word: {word}, one_or_more: [{word}]}}\ntags: {{a: {word}}}\nnames: [{word}]"
    assert meant(read(text), Whole) == {
        "part": {"word": word, "one_or_more": [word]}, "tags": {"a": word}, "names": [word]
    }  # fmt: skip


def test_other_fields_are_yaml():
    layer = meant(read("part: {rate: 1e-3, perhaps: null}\noptions: {a: 1e-3, b: [true, no], c: .inf, d: 0x10}"), Whole)
    assert layer["part"] == {"rate": 1e-3, "perhaps": None}
    assert layer["options"] == {"a": 1e-3, "b": [True, "no"], "c": float("inf"), "d": 16}
    assert meant(words.layer("part.perhaps", "null", Whole), Whole) == {"part": {"perhaps": None}}
    assert meant(words.layer("part.one_or_more", "[a, 07]", Whole), Whole) == {"part": {"one_or_more": ["a", "07"]}}
    assert meant(words.layer("options.a.b", "2", Whole), Whole) == {"options": {"a": {"b": 2}}}


def test_dotted_keys_anchors_and_merge_keys_work_in_mappings():
    text = "part.rate: &r 0.1\nparts: {p: &p {rate: *r}, q: {<<: *p, word: x}}\nparts.s.word: y\ntags.a.b: z"
    assert meant(read(text), Whole) == {
        "part": {"rate": 0.1},
        "parts": {"p": {"rate": 0.1}, "q": {"rate": 0.1, "word": "x"}, "s": {"word": "y"}},
        "tags": {"a.b": "z"},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nnull: 2", "line 2: the name null is no string; write it in quotes"),
        ("1.10: 2", "line 1: the name 1.10 is no string; write it in quotes"),
        ("[a]: 2", r"line 1: the name \[...\] is no string"),
        ("a: 1\na: 2", "line 2: a stands there twice"),
        ("a: &a [*a]", "line 1: .*recursive"),
        ("a: !!python/object:os.system x", "line 1: could not determine a constructor"),
        ("a: [", "line 2: "),
        (b"a: 1\nb: \xe9\n", "line 2: incomplete UTF-8"),
        ("a: 1\n\nb: \0\n", "line 3: control characters"),
        ("[" * 100_000, ""),
        (b"\xff\xfe\x00", ""),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: {a: 1}", r"names=\{'a': 1\} must be a list"),
        ("tags: [a]", r"tags=\['a'\] must be keys and values"),
        ("part: 3", "part is a group of keys; set one of part.word, part.rate"),
        ("parts: {p: []}", "parts.p is a group of keys; set one of parts.p.word"),
        ("part: {word: [a]}", r"part.word=\['a'\] must be a single str"),
        ("part: {word: '${oc.env:HOME}'}", r"part.word=\$\{oc.env:HOME\}: a value may refer to another key"),
        ("part: {rate: '???'}", r"part.rate=\?\?\? stands for a value that is missing"),
        (f"part: [{'x, ' * 10_000}]", r"^part is a group of keys"),
        (f"names: {{a: [{'x, ' * 10_000}]}}", r"^names=.{200}\.\.\. must be a list"),
        ("options: {a: '${${x}}'}", "a value may refer to another key"),
    ],
)
def test_another_shape_is_named_with_its_key(text, message):
    with pytest.raises(UsageError, match=message):
        meant(read(text), Whole)


def test_booleans_and_floats_of_a_program_are_no_words():
    with pytest.raises(UsageError, match=r"part.word=False is no string; write it in quotes"):
        meant({"part": {"word": False}}, Whole)
    assert read("3.10") == Plain("3.10", 3.1)


def test_quoted_numbers_are_numbers_where_those_belong():
    assert compose(RunConfig, [{"optim": {"lr": "1e-3"}, "trainer.steps": "200"}, "optim.eps='1e-7'"]).optim.eps == 1e-7
