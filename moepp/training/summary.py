"""What `train` says of a run at its end."""

import textwrap
from collections.abc import Iterator

from moepp.program import program
from moepp.records import RunRecord
from moepp.terminal import width

GROUPS = {
    "held-out text": ("val_loss", "val_bits_per_byte", "val_accuracy"),
    "routing": ("ffn_per_token", "dropped_share", "load_max_over_mean"),
    "speed": ("tokens_per_s", "step_time_ms", "train_seconds", "peak_mem_gib"),
}
INDENT, GLUE = 15, "\xa0"  # a name and its figure stay on one line
NEXT = {
    "continue a text": "generate {}",
    "beside another": "compare {} OTHER",
    "train it again": "rerun {}",
}


def summary(record: RunRecord) -> Iterator[str]:
    """Lines on the final metrics, by what they are about, and the commands that come next."""
    final = record.final()
    for group, names in GROUPS.items():
        shares = [name for name in final if name.endswith("_share") and name not in names] if group == "routing" else []
        found = [f"{name}{GLUE}{final[name]:.4g}" for name in (*names, *shares) if name in final]
        if found:
            yield from _wrapped(f"{group:<{INDENT}}{'  '.join(found)}")
    yield f"all {len(final)} figures: {record.path / 'metrics.jsonl'}"
    yield ""
    for purpose, command in NEXT.items():
        yield f"{purpose}: {program()} {command.format(record.path)}"


def _wrapped(line: str) -> list[str]:
    lines = textwrap.wrap(line, width() or len(line), subsequent_indent=" " * INDENT, break_on_hyphens=False)
    return [line.replace(GLUE, " ") for line in lines]
