"""Search spaces over config keys: a grid or random draws, written out as named arms, or a search that learns.

space:
  grid: {optim.lr: [1.0e-3, 3.0e-3], model: [vanilla, moepp]}      # every combination

space:
  random:                                                          # n different points
    n: 8
    seed: 0
    keys:
      optim.lr: {float: [1.0e-4, 1.0e-2], log: true}
      model.top_k: {int: [1, 3]}
      model.gate: {choice: [softmax, renormalized]}

space:
  tpe:                                                             # n proposals for each arm (moepp/sweeps/search.py)
    n: 30
    keys:
      optim.lr: {float: [1.0e-4, 1.0e-2], log: true}
      model.balance.tau: {float: [0.1, 1.0], arms: [moepp]}        # searched in these arms only
"""

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moepp.errors import UsageError
from moepp.names import plain

MOST_POINTS = 10_000
DRAWS_PER_POINT = 1000  # before a random space counts as too small for its n
Point = dict[str, Any]  # config key -> value


@dataclass(frozen=True)
class Axis:
    """The values that a key may take."""

    kind: str  # float, int or choice
    values: tuple[Any, ...]  # low and high, both included, or the choices
    log: bool = False
    arms: tuple[str, ...] = ()  # of a tpe search: where the key is searched; empty for all

    def draw(self, u: float) -> Any:
        """Turns a uniform number in [0, 1) into a value."""
        if self.kind == "choice":
            return self.values[int(u * len(self.values))]
        low, high = self.values
        if self.kind == "int":
            return min(high, int(_between(low, high + 1, u, self.log)))
        return self.shown(_between(low, high, u, self.log))

    def shown(self, value: Any) -> Any:
        """A float as short as people write it, so that what they read is exactly what is trained."""
        return min(max(float(f"{value:.4g}"), self.values[0]), self.values[1]) if self.kind == "float" else value

    @property
    def extremes(self) -> tuple[Any, ...]:
        return self.values if self.kind == "choice" else tuple(dict.fromkeys(self.values))


@dataclass(frozen=True)
class SearchSpace:
    """`n` proposals for each arm, along `axes`. `seed` is the sampler's."""

    n: int
    axes: dict[str, Axis]
    seed: int = 0

    def of(self, arm: str) -> dict[str, Axis]:
        return {key: axis for key, axis in self.axes.items() if not axis.arms or arm in axis.arms}


def expand(space: Mapping[str, Any]) -> dict[str, list[str]]:
    """Arms by name, such as `lr=0.003,tau=0.5`, each a list of overrides; the same space always gives the same arms,
    and none where the points are yet to be proposed.

    Raises UsageError for what is no space.
    """
    kind, content = _only(space)
    points = list({"grid": _grid, "random": _random, "tpe": _none_yet}[kind](content))
    arms = {_name(point): overrides(point) for point in points}
    if len(arms) < len(points):
        raise UsageError(f"space.{kind}: two points would have one name, {_twice(map(_name, points))}")
    return arms


def search_space(space: Mapping[str, Any]) -> SearchSpace | None:
    """The space of a search; None where `space` needs none. Raises UsageError for what is no space."""
    if not space or _only(space)[0] != "tpe":
        return None
    return SearchSpace(*_counted("tpe", space["tpe"]))


def overrides(point: Point) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in point.items()]


def _only(space: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if len(space) != 1 or next(iter(space)) not in ("grid", "random", "tpe"):
        raise UsageError(f"space must hold one of grid, random and tpe, not {', '.join(map(str, space)) or 'nothing'}")
    kind, content = next(iter(space.items()))
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"space.{kind} must hold keys and values")
    return kind, content


def _grid(axes: Mapping[str, Any]) -> Iterator[Point]:
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"space.grid: {key} must be a list of values, not {values}")
    if (points := math.prod(map(len, axes.values()))) > MOST_POINTS:
        raise UsageError(f"space.grid has {points:,} points; at most {MOST_POINTS:,} can be arms")
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _random(content: Mapping[str, Any]) -> Iterator[Point]:
    n, axes, seed = _counted("random", content)
    generator = random.Random(seed)
    points: dict[str, Point] = {}
    for _ in range(n * DRAWS_PER_POINT):
        point = {key: axis.draw(generator.random()) for key, axis in axes.items()}
        points.setdefault(_name(point), point)
        if len(points) == n:
            return iter(points.values())
    raise UsageError(f"space.random: there are no {n} different points; found {len(points)}")


def _none_yet(content: Mapping[str, Any]) -> tuple[()]:
    _counted("tpe", content)
    return ()


def _counted(kind: str, content: Mapping[str, Any]) -> tuple[int, dict[str, Axis], int]:
    """n, axes and seed of a space that states how many points it has."""
    if not {"n", "keys"} <= set(content) <= {"n", "seed", "keys"}:
        raise UsageError(f"space.{kind} must hold n, keys and, where it is not 0, seed")
    n, keys, seed = content["n"], content["keys"], content.get("seed", 0)
    whole = type(n) is int and 1 <= n <= MOST_POINTS and type(seed) is int
    if not whole or not isinstance(keys, Mapping) or not keys:
        raise UsageError(
            f"space.{kind}: n={n} and seed={seed} must be whole numbers, n at least 1 and at most {MOST_POINTS:,}, and"
            " keys a mapping"
        )
    return n, {key: _axis(kind, key, axis) for key, axis in keys.items()}, seed


def _axis(space: str, key: str, axis: Any) -> Axis:
    wrong = UsageError(
        f"space.{space}: {key} must be {{float: [low, high]}}, {{int: [low, high]}} (each with log: true if wished)"
        " or {choice: [...]}" + (", with arms: [...] if it is not for all" if space == "tpe" else "")
    )
    axis = dict(axis) if isinstance(axis, Mapping) else {}
    log, arms = axis.pop("log", False), axis.pop("arms", []) if space == "tpe" else []
    if len(axis) != 1 or type(log) is not bool or not isinstance(arms, list):
        raise wrong
    if not all(isinstance(arm, str) for arm in arms):
        raise wrong
    kind, values = next(iter(axis.items()))
    if kind == "choice" and isinstance(values, list) and values and not log:
        return Axis(kind, tuple(values), arms=tuple(arms))
    if kind not in ("float", "int") or not isinstance(values, list) or len(values) != 2:
        raise wrong
    number = int if kind == "int" else (int, float)
    low, high = values
    if not all(isinstance(v, number) and type(v) is not bool and math.isfinite(v) for v in values):
        raise wrong
    if low > high or (log and low <= 0):
        raise wrong
    return Axis(kind, (low, high), log, tuple(arms))


def _between(low: float, high: float, u: float, log: bool) -> float:
    return math.exp(math.log(low) + u * (math.log(high) - math.log(low))) if log else low + u * (high - low)


def _name(point: Point) -> str:
    """Keys by their last part, unless two end alike."""
    short = [key.rpartition(".")[2] for key in point]
    names = short if len(set(short)) == len(short) else point
    return plain(",".join(f"{name}={_text(value)}" for name, value in zip(names, point.values(), strict=True)))


def _twice(names: Iterable[str]) -> str:
    return Counter(names).most_common(1)[0][0]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value)
