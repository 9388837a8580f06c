"""The command that repeats a report."""

import shlex
from collections.abc import Mapping, Sequence


def reproduce_command(
    name: str,
    scale: str,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
    flags: Mapping[str, str] | None = None,
) -> str:
    """`python run.py reproduce NAME ...` as a shell takes it. `flags` are options by name, such as `tasks_dir`."""
    words = ["python", "run.py", "reproduce", name, "--scale", scale]
    words += ["--seeds", *map(str, seeds)] if seeds else []
    for option, value in (flags or {}).items():
        words += [f"--{option.replace('_', '-')}", value]
    return shlex.join([*words, *overrides])
