"""The parts of a layer by name: those that stand here, and everybody else's. Standard library only.

A part that comes with the package is named below with the module that defines it, which is imported when the part is
first asked for: what names there are is known without torch. Anyone else's is registered by a decorator,
`@router("mine")`, on a class or a function.
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from types import FrameType
from typing import Any, TypeVar

from .bounds import refusals, taken_apart

Part = TypeVar("Part", bound=Callable[..., Any])
SCALARS = (bool, int, float, str)  # annotations that an option's value is checked against


class PartError(Exception):
    """A part gave what no layer can use; in one line which part, what it gave and what is needed."""


class Registry:
    """The parts of one kind, by name.

    `key` and `options` are the config's keys for a part's name and its options, `{}` standing for the name. `given` is
    what every part is called with, by position; its other parameters are its options. `defined` names the modules of
    the package's own parts; these are `complete` where none of them needs options.
    """

    def __init__(
        self,
        kind: str,
        key: str,
        options: str,
        given: tuple[str, ...],
        defined: Mapping[str, str] | None = None,
        complete: bool = True,
    ):
        self.kind, self.key, self.options_key, self.given = kind, key, options, given
        self.defined, self.complete = dict(defined or {}), complete
        self.find_more: Callable[[], None] = lambda: None  # called before a name is refused; may register more
        # Makes one of the package's own parts with options of somebody else's library, which alone knows their ranges;
        # set where such parts are defined. Raises whatever that library raises.
        self.attempt: Callable[[str, Mapping[str, Any]], object] = lambda name, options: None
        self._parts: dict[str, Callable[..., Any]] = {}

    def __call__(self, name: str) -> Callable[[Part], Part]:
        """A decorator that registers a class or function. Raises ValueError for the name of another module's part."""

        def add(part: Part) -> Part:
            owner = self.module(name)
            if owner not in (None, part.__module__):
                raise ValueError(f"{self.kind} '{name}' of {part.__module__}: {owner} has one of that name; rename it")
            self._parts[name] = part
            return part

        return add

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """The part of that name. Raises ValueError, in one line, where there is none."""
        self.check_name(name)
        if name not in self._parts:
            importlib.import_module(self.defined[name])  # where its decorator registers it
        return self._parts[name]

    def names(self) -> list[str]:
        """All names, the package's own first."""
        return list(dict.fromkeys([*self.defined, *self._parts]))

    def module(self, name: str) -> str | None:
        """The module that defines the part; None where no part has that name."""
        return self.defined.get(name) or getattr(self._parts.get(name), "__module__", None)

    def described(self, name: str) -> str:
        """The part for messages about it: router 'mine' (mine.py)."""
        file = getattr(sys.modules.get(self.module(name)), "__file__", None)
        return f"{self.kind} '{name}'" + (f" ({PurePath(file).name})" if file else "")

    def unusable(self, name: str, given: object, needed: str, what: str = "returned") -> PartError:
        """What to raise where the part gave something else than is needed."""
        shape = getattr(given, "shape", None)
        found = type(given).__name__ if shape is None else list(shape)
        return PartError(f"{self.described(name)} {what} {found}; {needed} is needed")

    def part_in(self, frame: FrameType) -> str | None:
        """The name of the registered part whose code the frame runs."""
        module, runs, of = frame.f_globals.get("__name__"), frame.f_code.co_qualname, type(frame.f_locals.get("self"))
        for name, part in self._parts.items():
            own = getattr(part, "__qualname__", None)
            if part is of or (part.__module__ == module and own and (runs == own or runs.startswith(f"{own}."))):
                return name
        return None

    def check_name(self, name: str) -> None:
        """Raises ValueError, in one line, for a name that no part has."""
        if self.module(name) is None:
            self.find_more()
        if self.module(name) is None:
            raise ValueError(f"{self.key}={name}: no such {self.kind}; choose from {_choices(name, self.names())}")

    def check(self, name: str, options: Mapping[str, Any]) -> None:
        """Raises ValueError, in one line, for a name that no part has and for options that the part does not take.

        Parts of the package's own that need no options are not imported for it.
        """
        self.check_name(name)
        if not isinstance(options, Mapping):
            raise ValueError(f"{self.options_key.format(name)}={options} must hold options by their names")
        if options or name not in self.defined or not self.complete:
            self._check_options(name, options)

    def _check_options(self, name: str, options: Mapping[str, Any]) -> None:
        self._check_given(name)
        taken, key = self.options(name), self.options_key.format(name)
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        for option, value in options.items():
            if option not in taken and not anything:
                choices = _choices(option, taken) if taken else "no options"
                raise ValueError(f"{key}.{option}: {self.kind} {name} takes {choices}")
            annotation = taken[option].annotation if option in taken else Any
            kind, _, optional = taken_apart(annotation)
            if not (_fits(value, kind) or (optional and value is None)):
                raise ValueError(f"{key}.{option}={value} is no {kind.__name__}")
            for refusal in refusals(type(value) if annotation is Any else annotation, value, f"{key}.{option}"):
                raise ValueError(refusal)
        for option, parameter in taken.items():
            needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            if needed and option not in options:
                raise ValueError(f"{self.kind} {name} needs {key}.{option}")
        if name in self.defined:
            self._try(name, options)

    def _check_given(self, name: str) -> None:
        parameters = inspect.signature(self[name]).parameters.values()
        by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(by_position) < len(self.given) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            taken = ", ".join(p.name for p in by_position) or "nothing"
            raise ValueError(f"{self.described(name)} takes {taken}; it is called with {', '.join(self.given)}")

    def _try(self, name: str, options: Mapping[str, Any]) -> None:
        key = self.options_key.format(name)
        try:
            self.attempt(name, options)
        except Exception as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{key}={dict(options)}: {self.kind} {name} refuses this: {said}") from None

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The parameters that are the part's own options, by name."""
        parameters = list(inspect.signature(self[name], eval_str=True).parameters.values())[len(self.given) :]
        return {p.name: p for p in parameters if p.kind is not p.VAR_POSITIONAL}


def _fits(value: Any, annotation: Any) -> bool:
    if annotation not in SCALARS:
        return True
    return type(value) in ((int, float) if annotation is float else (annotation,))


def _choices(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(str(name), known := list(known), n=1, cutoff=0.5)
    return ", ".join(known) + (f"; did you mean {nearest[0]}?" if nearest else "")


# Modules by this package's own name, whatever that is where it was copied to.
ROUTERS, BALANCE = f"{__package__}.router", f"{__package__}.balance"
RIVAL_ROUTERS, EXPERTS, CONTROL = f"{__package__}.rival_routers", f"{__package__}.experts", f"{__package__}.control"

router = Registry(
    "router",
    key="router",
    options="router_options",
    given=("config", "first"),
    defined={
        "linear": ROUTERS,
        "two_layer": ROUTERS,
        "shared_null": RIVAL_ROUTERS,
        "recurrent": RIVAL_ROUTERS,
    },
)
expert = Registry(
    "expert type",
    key="experts.others",
    options="expert_options.{}",
    given=("config", "count"),
    defined={"constant": EXPERTS, "copy": EXPERTS, "zero": EXPERTS, "vector": EXPERTS, "scaled_copy": EXPERTS},
)
selection = Registry(
    "selection",
    key="selection",
    options="selection_options",
    given=("logits_TN", "config", "bias_N"),
    defined={"top_k": ROUTERS, "top_p": ROUTERS, "relu": ROUTERS, "sigmoid": ROUTERS},
)
gate = Registry(
    "gate",
    key="gate",
    options="gate_options",
    given=("routing", "config"),
    defined={"released": ROUTERS, "softmax": ROUTERS, "renormalized": ROUTERS},
)
balance = Registry(
    "balance form",
    key="balance.form",
    options="balance.options",
    given=("mean_probs_N", "share_N", "counts", "config"),
    defined={"paper": BALANCE, "switch": BALANCE, "null_averaged": BALANCE, "grouped": BALANCE},
)
control = Registry(
    "control",
    key="balance.control",
    options="balance.control_options",
    given=("config", "counts"),
    defined={"loss_free": CONTROL, "longcat": CONTROL, "remoe": CONTROL},
)
