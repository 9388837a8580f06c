"""What values may be, said beside each field of a config: `lr: Annotated[float, Range(above=0)] = 5e-4`.

A number is finite even where its field says nothing more, and a `Literal` is one of its values. `Bounded` refuses the
rest when a config is made, and what is no number, switch or part where its field is one: NaN passes no comparison, and
nothing is left to a crash later on. Standard library only.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

MEANT = {bool: "true or false", int: "a whole number", float: "a number"}  # what a field of that type holds
LARGEST = 2**24  # of sizes: more is a slip of the finger, and no machine's memory


@dataclass(frozen=True)
class Range:
    """Finite numbers between two ends; `above` and `below` leave the end itself out."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def allows(self, value: float) -> bool:
        """False for NaN, which no comparison is true of."""
        finite = -math.inf < value < math.inf
        return finite and self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        low, high = max(self.least, self.above), min(self.most, self.below)
        if low == -math.inf:
            return "must be finite"
        if low == self.above and high == self.below < math.inf:
            return f"must lie between {low:g} and {high:g}"
        lowest = f"be {'above' if low == self.above else 'at least'} {low:,}"
        if low == 0:
            lowest = "be positive" if low == self.above else "not be negative"
        highest = f"{'below' if high == self.below else 'at most'} {high:,}" if high < math.inf else "finite"
        return f"must {lowest}, and {highest}"


FINITE = Range()
Whole = Annotated[int, Range(0, LARGEST)]
Count = Annotated[int, Range(1, LARGEST)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # numpy's, whose generator a run seeds as well
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(above=0, most=1)]
Weight = Annotated[float, Range(0, 100)]  # of a loss beside the cross-entropy
Seconds = Annotated[float, Range(above=0, most=10**7)]


class Bounded:
    """A dataclass whose values are checked when it is made; `key` is where it stands in a config.

    Raises ValueError, in one line that names the key, the value and what is allowed.
    """

    _key: ClassVar[str] = ""

    def __init_subclass__(cls, key: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._key = key

    def __post_init__(self) -> None:
        for check in (mistakes, refusals):
            for refusal in check(type(self), self, self._key):
                raise ValueError(refusal)


def mistakes(kind: Any, value: Any, key: str = "") -> Iterator[str]:
    """What is no value of that type at all: of a config, and of all that lies in it. Files never get so far: what they
    hold becomes a config by type.
    """
    kind, _, optional = taken_apart(kind)
    if optional and value is None:
        return
    if kind in MEANT:
        number = isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
        if not (isinstance(value, bool) if kind is bool else number):
            yield f"{key}={value!r} must be {MEANT[kind]}{', or null' if optional else ''}"
    elif is_dataclass(kind) and not isinstance(value, kind):
        yield f"{key}={value!r} must be made by {kind.__name__}(...)"
    elif is_dataclass(kind):
        for name, part in parts(kind).items():
            inside = getattr(value, name)
            if not (isinstance(inside, Bounded) and isinstance(inside, taken_apart(part)[0])):  # it has checked itself
                yield from mistakes(part, inside, f"{key}.{name}" if key else name)
    elif get_origin(kind) is dict and not isinstance(value, Mapping):
        yield f"{key}={value!r} must hold values by their names"
    elif get_origin(kind) is dict:
        for name, item in value.items():
            yield from mistakes(get_args(kind)[1], item, f"{key}.{name}")


def refusals(kind: Any, value: Any, key: str = "") -> Iterator[str]:
    """What is wrong with a value of that type: a config, made or still as nested mappings, and all that lies in it."""
    kind, allowed, optional = taken_apart(kind)
    if is_dataclass(kind) and isinstance(value, Mapping | kind):
        for name, part in _bounded_parts(kind).items():
            inside = value.get(name) if isinstance(value, Mapping) else getattr(value, name)
            if not isinstance(inside, Bounded):  # which has refused its own when it was made
                yield from refusals(part, inside, f"{key}.{name}" if key else name)
    elif get_origin(kind) is dict and isinstance(value, Mapping):
        for name, item in value.items():
            yield from refusals(get_args(kind)[1], item, f"{key}.{name}")
    elif get_origin(kind) is list and isinstance(value, list):
        for item in value:
            yield from refusals(get_args(kind)[0], item, key)
    elif get_origin(kind) is Literal and not (optional and value is None) and value not in get_args(kind):
        yield f"{key}={value} must be one of {', '.join(map(repr, get_args(kind)))}"
    elif kind in (int, float) and isinstance(value, int | float) and not allowed.allows(value):
        yield f"{key}={value} {allowed}{', or null' if optional else ''}"


@lru_cache(maxsize=64)
def _bounded_parts(schema: type) -> dict[str, Any]:
    """Those of which a value may be refused."""
    return {name: kind for name, kind in parts(schema).items() if taken_apart(kind)[0] not in (str, bool, Any)}


@lru_cache(maxsize=64)
def parts(schema: type) -> dict[str, Any]:
    """The type of every field, by name, with what stands in Annotated."""
    hints = get_type_hints(schema, include_extras=True)
    return {field.name: hints[field.name] for field in fields(schema)}


@lru_cache(maxsize=256)
def taken_apart(kind: Any) -> tuple[Any, Range, bool]:
    """A field's type without Annotated and None; its range; whether None is among its values."""
    allowed, optional = FINITE, NoneType in get_args(kind)
    if optional and len(left := [choice for choice in get_args(kind) if choice is not NoneType]) == 1:
        kind = left[0]
    if get_origin(kind) is Annotated:
        kind, allowed = get_args(kind)
    return kind, allowed, optional
