"""`python run.py route FOLDER`: a retrofitted model's loss against the FFN experts a token uses, as the offsets of its
new experts move. Nothing is trained.

Shape suffixes: W windows of a batch, S positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moepp.errors import UsageError
from moepp.retrofit.model import TransformersModel
from moepp.retrofit.modeling import SILENT, routers
from moepp.routing.dial import curve, held_out_batches, loss_and_compute, write_figure
from moepp.training.asked import asked_for
from moepp.training.foreign import completed

OFFSETS = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)


def route_by_offsets(
    folder: Path, offsets: Sequence[float], overrides: Sequence[str] = (), out: Path | None = None
) -> str:
    """The table and where the knee is; written with the figure to `out`, else to the model's folder. `overrides` are of
    a run's config, whose data are measured. Raises UsageError for a model without new experts.
    """
    config = completed(asked_for(["model=hf", f"model.path={folder}", *overrides]))
    model = TransformersModel(config.model).eval()
    if not any(len(router.new_rows) for router in routers(model)):
        raise UsageError(f"{folder} holds a model without new experts: retrofit and calibrate it first")
    batches, rows = held_out_batches(config.data), []
    for offset in sorted(set(offsets)):
        with shifted(model, offset):
            rows.append((offset, *loss_and_compute(model, batches)))
    figure = curve(rows, "route", "offset", "what is added to the offsets of new experts")
    return "\n".join([write_figure(figure, out or folder), "", say_knee(rows)])


@contextmanager
def shifted(model: Any, offset: float) -> Iterator[None]:
    """The model with its new experts' offsets raised, those of silent ones too: from 0."""
    before = {router: router.offset.clone() for router in routers(model)}
    try:
        for router, given in before.items():
            router.offset.copy_(torch.where(given <= SILENT, 0, given) + offset)
        yield
    finally:
        for router, given in before.items():
            router.offset.copy_(given)


def say_knee(rows: Sequence[tuple[float, float, float]]) -> str:
    """Of (offset, FFN experts per token, nats per token)."""
    found = knee([(used, nats) for _, used, nats in rows])
    if found is None:
        return "There is no knee: each FFN expert that is left out costs as much as the others, or less."
    offset, used, nats = rows[found]
    return f"The knee is at offset {offset:+g}: {used:.3g} FFN experts per token at {nats:.4f} nats per token."


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """The index of the point (compute, loss) that lies furthest below the straight line between the ends, both axes
    scaled to 1 (Kneedle, Satopaa et al. 2011); None where none lies below it by a hundredth.
    """
    low, high = min(points), max(points)
    width, height = high[0] - low[0], low[1] - high[1]
    if width <= 0 or height <= 0:
        return None
    below = [1 - (x - low[0]) / width - (y - high[1]) / height for x, y in points]
    best = max(range(len(points)), key=below.__getitem__)
    return best if below[best] > 0.01 else None
