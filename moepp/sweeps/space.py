"""Search spaces: a grid or random draws over config keys, written out as named arms.

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
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moepp.errors import UsageError

DRAWS_PER_POINT = 1000  # before a random space counts as too small for its n
Point = dict[str, Any]  # config key -> value


def expand(space: Mapping[str, Any]) -> dict[str, list[str]]:
    """Arms by name, such as `lr=0.003,tau=0.5`, each a list of overrides; the same space always gives the same arms.

    Raises UsageError for what is no space.
    """
    kinds = {"grid": _grid, "random": _random}
    if len(space) != 1 or next(iter(space)) not in kinds:
        raise UsageError(f"space must hold either grid or random, not {', '.join(map(str, space)) or 'nothing'}")
    kind, content = next(iter(space.items()))
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"space.{kind} must hold keys and values")
    return {_name(point): [f"{key}={_text(value)}" for key, value in point.items()] for point in kinds[kind](content)}


def _grid(axes: Mapping[str, Any]) -> Iterator[Point]:
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"space.grid: {key} must be a list of values")
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _random(content: Mapping[str, Any]) -> Iterator[Point]:
    if not {"n", "keys"} <= set(content) <= {"n", "seed", "keys"}:
        raise UsageError("space.random must hold n, keys and, where it is not 0, seed")
    n, keys, seed = content["n"], content["keys"], content.get("seed", 0)
    if type(n) is not int or n < 1 or type(seed) is not int or not isinstance(keys, Mapping) or not keys:
        raise UsageError("space.random: n and seed must be whole numbers, n at least 1, and keys a mapping")
    draws = {key: _distribution(key, axis) for key, axis in keys.items()}
    generator = random.Random(seed)
    points: dict[str, Point] = {}
    for _ in range(n * DRAWS_PER_POINT):
        point = {key: draw(generator.random()) for key, draw in draws.items()}
        points.setdefault(_name(point), point)
        if len(points) == n:
            return iter(points.values())
    raise UsageError(f"space.random: there are no {n} different points; found {len(points)}")


def _distribution(key: str, axis: Any) -> Callable[[float], Any]:
    """What turns a uniform number in [0, 1) into a value of `key`."""
    wrong = UsageError(
        f"space.random: {key} must be {{float: [low, high]}}, {{int: [low, high]}} (each with log: true if wished)"
        " or {choice: [...]}"
    )
    axis = dict(axis) if isinstance(axis, Mapping) else {}
    log = axis.pop("log", False)
    if len(axis) != 1 or type(log) is not bool:
        raise wrong
    kind, values = next(iter(axis.items()))
    if kind == "choice" and isinstance(values, list) and values and not log:
        return lambda u: values[int(u * len(values))]
    if kind not in ("float", "int") or not isinstance(values, list) or len(values) != 2:
        raise wrong
    number = int if kind == "int" else (int, float)
    low, high = values
    if not all(isinstance(v, number) and type(v) is not bool for v in values) or low > high or (log and low <= 0):
        raise wrong
    if kind == "int":
        return lambda u: min(high, int(_between(low, high + 1, u, log)))
    return lambda u: float(f"{_between(low, high, u, log):.4g}")  # the arm's name shows exactly what is trained


def _between(low: float, high: float, u: float, log: bool) -> float:
    return math.exp(math.log(low) + u * (math.log(high) - math.log(low))) if log else low + u * (high - low)


def _name(point: Point) -> str:
    """Keys by their last part, unless two end alike."""
    short = [key.rpartition(".")[2] for key in point]
    names = short if len(set(short)) == len(short) else point
    return ",".join(f"{name}={_text(value)}" for name, value in zip(names, point.values(), strict=True))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value)
