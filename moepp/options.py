"""Options that several commands share, alike in each."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from moepp.grammar import Number, Several
from moepp.layers.bounds import Count, NotNegative, Seed, Whole
from moepp.terminal import WIDE


class Place(click.Path):
    """A path in which `~` is the home folder, also where no shell has said so: as in `--out=~/results`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


DIRECTORY = Place(path_type=Path)

out = click.option("--out", type=DIRECTORY, metavar="DIR", help="Write DIR/<name>/<scale>/; else beside the records.")
overrides = click.argument("overrides", nargs=-1, metavar="[key=value]...")
scale = click.option(
    "--scale",
    default="laptop",
    help="smoke, laptop, desk, gpu or paper, as the sweep file defines them.",
    show_default=True,
)
workers = click.option(
    "--workers", type=Number(Whole), default=0, help="Trials at a time; 0: one per core, one per GPU."
)
seeds = click.option(
    "--seeds", type=Several(Number(Seed)), help="Instead of the sweep file's; a range such as 0..19 is taken too."
)
minutes = partial(click.option, "--minutes", type=Number(NotNegative))
tasks = partial(click.option, "--tasks", help="`paper`: the paper's eleven; or names, as sciq,piqa,boolq:0.")
tasks_dir = click.option(
    "--tasks-dir", type=DIRECTORY, metavar="DIR", help="Local task data, <task>.jsonl[.gz]; else the hub's."
)
wide = click.option(
    "--wide",
    is_flag=True,
    expose_value=False,
    callback=lambda context, _, asked: context.meta.update({WIDE: asked}),
    help="All columns of tables, beyond the width of the terminal.",
)
limit = click.option("--limit", type=Number(Count), help="Examples of each task at most, in all of its parts.")
