"""The grammar of the command line, on click: options, `name=value` for any of them, and values of the config.

`scale=smoke` is `--scale smoke` where a command has that option. Any other `key=value` belongs to the config; such
words may stand anywhere.
"""

import io
import os
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import click

from moepp.errors import Interrupted, RunError, UsageError, reason
from moepp.layers.bounds import taken_apart
from moepp.layers.registry import PartError
from moepp.names import did_you_mean
from moepp.program import missing, program
from moepp.ranges import whole_range
from moepp.terminal import painted

VALUE = re.compile(r"[^-/:=\s][^/:=\s]*=", re.ASCII)  # no path, and no directory:arm, begins a value
NEGATIVE = re.compile(r"-[\d.]")


class Number(click.ParamType):
    """A number of a type such as `Count`."""

    name = "number"

    def __init__(self, allowed: Any):
        self.kind, self.range, _ = taken_apart(allowed)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            number = self.kind(value)
        except ValueError:
            self.fail(f"'{value[:80]}' is no {'whole ' * (self.kind is int)}number", param, ctx)
        if not self.range.allows(number):
            self.fail(f"{str(value)[:80]} {self.range}", param, ctx)
        return number

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "N" if self.kind is int else "X"


class Several(click.ParamType):
    """One value or more: `--seeds 0 1 2`, `--seeds 0,1,2`, and of whole numbers `--seeds 0..2`."""

    name = "list"

    def __init__(self, each: click.ParamType):
        self.each = each

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if isinstance(value, list):
            return value
        return [self.each.convert(word, param, ctx) for part in value.split(",") for word in _span(part)]

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"{self.each.get_metavar(param, ctx) or self.each.name.upper()}..."


class Unicode(click.ParamType):
    """What a person writes; a file in another encoding, pasted by a shell, is none."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail(f"{ascii(value)[:80]} is no UTF-8 text", param, ctx)
        return value


class Word(click.Choice):
    """One of a few words; a mistyped one gets the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        words = [str(choice) for choice in self.choices]
        return f"'{value}' is none of {', '.join(words)}{did_you_mean(str(value), words)}"


def _span(word: str) -> Sequence[str]:
    """`0..19` as the whole numbers from the first to the last, any other word alone."""
    numbers = whole_range(word)
    return [*map(str, numbers)] if numbers else [word]


class Command(click.Command):
    """A command whose help ends with examples, each given without the command's name."""

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **options: Any):
        super().__init__(*arguments, **options)
        self.examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words, values = self._sorted(args)
        _refuse_contradictions(values)
        rest = super().parse_args(ctx, words)
        if values and "overrides" not in ctx.params:
            ctx.fail(f"unrecognized arguments: {' '.join(values)}")
        if values:
            ctx.params["overrides"] = (*ctx.params["overrides"], *values)
        return rest

    def _sorted(self, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """The words as click knows them, and the values of the config."""
        flags = {flag: option for option in self.params for flag in option.opts if isinstance(option, click.Option)}
        words, values, rest = [], [], deque(args)
        while rest:
            word = rest.popleft()
            key, _, value = word.partition("=")
            named = flags.get(f"--{key.replace('_', '-')}")
            if (option := flags.get(word)) and isinstance(option.type, Several):
                words.append(f"{word}={','.join(_listed(rest))}")
            elif option and not option.is_flag:
                words += [word, *([rest.popleft()] if rest else [])]
            elif VALUE.match(word) and named and not named.is_flag:
                words.append(f"{named.opts[0]}={value}")
            else:
                (values if VALUE.match(word) else words).append(word)
        return words, values

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"  {program()} {self.name} {example}".rstrip() + "\n")


def _refuse_contradictions(values: Sequence[str]) -> None:
    """Of a key that is written twice one value would be lost in silence."""
    said: dict[str, str] = {}
    for word in values:
        key = word.partition("=")[0]
        if said.setdefault(key, word) != word:
            raise UsageError(f"{said[key]} and {word} stand on one command line: give {key} once")


def _listed(rest: deque[str]) -> Iterator[str]:
    """The words that follow an option of several values, as far as they can be such."""
    while rest and not VALUE.match(rest[0]) and (rest[0][:1] != "-" or NEGATIVE.match(rest[0])):
        yield rest.popleft()


class CommandGroup(click.Group):
    """The program, whose commands are listed in the order in which they are written."""

    command_class = Command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, shown = args[0], [name for name, command in self.commands.items() if not command.hidden]
        if name not in self.commands:
            choices = f"; choose from {', '.join(shown)}"
            ctx.fail(f"no command '{name}'{did_you_mean(name, shown) or choices}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown = [(name, command) for name, command in self.commands.items() if not command.hidden]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=200)) for name, command in shown])


def run_command(group: click.Group, arguments: Sequence[str] | None) -> int:
    """Runs one command; returns the exit code, and says in one line why it is not 0."""
    _open_streams()
    try:
        return group.main(arguments, prog_name=program(), standalone_mode=False) or 0
    except (UsageError, RunError) as error:
        return _said(f"error: {error}", error.exit_code)
    except click.ClickException as error:
        return _said(f"error: {' '.join(error.format_message().split())}", error.exit_code)
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # which click takes for the end of what a person types
            return _said(f"error: a file ends too early: {abort.__cause__}", RunError.exit_code)
        return _said("interrupted; the same command continues", Interrupted.exit_code)
    except PartError as error:
        return _said(f"error: {error}", UsageError.exit_code)
    except Exception as error:
        from moepp.register import failed

        if said := failed(error):
            return _said(str(said), said.exit_code)
        if isinstance(error, ModuleNotFoundError) and (error.name or "moepp").partition(".")[0] != "moepp":
            return _said(missing(error.name), RunError.exit_code)
        if isinstance(error, OSError):  # a folder that is not there, is none, or must not be read or written
            where = f"cannot read or write {error.filename}: " if error.filename else ""
            return _said(f"error: {where}{reason(error)}", RunError.exit_code)
        raise


def _open_streams() -> None:
    """What is said is lost where a stream is closed, and spelled out where its encoding lacks a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _said(line: str, code: int) -> int:
    before, colon, rest = line.partition("error:")
    print(f"{before}{painted(colon, sys.stderr, fg='red')}{rest}", file=sys.stderr)
    return code
