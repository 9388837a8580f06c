"""One look for all figures. Markers and hatches carry the meaning, so that a grey print loses nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


@contextmanager
def styled() -> Iterator[None]:
    """Figures made and saved inside look alike, whatever the user's own matplotlib settings."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def axes_of(width: float, height: float, columns: int = 1, rows: int = 1) -> "tuple[Figure, Any]":
    """A figure of `width` x `height` inches, without pyplot's global state, and its axes (an array of several)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns)


def save(figure: "Figure", stem: Path) -> list[Path]:
    """Writes `stem`.svg and `stem`.png, which hold no date and no version, so that bytes repeat."""
    svg, png = stem.with_name(f"{stem.name}.svg"), stem.with_name(f"{stem.name}.png")
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    figure.savefig(png, dpi=150, metadata={"Software": None})
    return [svg, png]
