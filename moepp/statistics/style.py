"""The one figure of all reports, and its look: markers and hatches carry the meaning, so a grey print loses nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepp.statistics.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text: a third of the size, and it can be searched
    "svg.hashsalt": "moepp",  # without it element ids differ at every save
}
INK, GREY, BLUE = "0.1", "0.55", "#2b6ca3"
# One colour and marker per arm; the colours are those of Okabe and Ito, told apart with any colour vision.
COLOURS = ("0.1", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#8c8c8c", "#0072b2")
MARKERS = "os^vDPX*"


@dataclass(frozen=True)
class Figure:
    """Saved as `data.name`.svg and .png, and `data` as .csv: exactly what is drawn. `draw` makes its canvas with
    `axes_of`, and is called in the common style.
    """

    data: Table
    draw: "Callable[[], Canvas]"


@contextmanager
def styled() -> Iterator[None]:
    """Figures made and saved inside look alike, whatever the user's own matplotlib settings."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def axes_of(width: float, height: float, columns: int = 1, rows: int = 1) -> "tuple[Canvas, Any]":
    """A canvas of `width` x `height` inches, without pyplot's global state, and its axes (an array of several)."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height))
    return canvas, canvas.subplots(rows, columns)


def save(figure: Figure, folder: Path) -> list[Path]:
    """Draws the figure's .svg and .png, which hold no date and no version, so that bytes repeat."""
    svg, png = (folder / f"{figure.data.name}{suffix}" for suffix in (".svg", ".png"))
    with styled():
        canvas = figure.draw()
        canvas.savefig(svg, metadata={"Date": None, "Creator": None})
        canvas.savefig(png, dpi=150, metadata={"Software": None})
    return [svg, png]
