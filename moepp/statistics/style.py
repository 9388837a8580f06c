"""The one figure of all reports, and its look: markers, lines and hatches tell things apart, so that a grey print or a
reader without some of the colours loses nothing.
"""

import io
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepp.statistics.tables import Table
from moepp.statistics.wording import several

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
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
INK, GREY, BLUE = "#1a1a1a", "0.55", "#2b6ca3"
# Of Okabe and Ito, with a wine: told apart with any colour vision. Their number shares no factor with the markers', so
# that 70 arms differ in one or the other, and the line changes before a marker comes again.
COLOURS = ("#d55e00", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#882255")
MARKERS = "s^DvP*X<>p"
LINES = ("-", "--", "-.", ":")
BASELINE = {"color": INK, "marker": "o", "ls": "-", "lw": 2.0}  # of no other arm
LABEL_GAP = 10.5  # points from one label at the end of a line to the next
Look = dict[str, Any]


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


def axes_of(width: float, height: float, columns: int = 1, rows: int = 1, **shape: Any) -> "tuple[Canvas, Any]":
    """A canvas of `width` x `height` inches, without pyplot's global state, and its axes (an array of several);
    `shape` as of matplotlib's subplots.
    """
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height))
    return canvas, canvas.subplots(rows, columns, **shape)


def looks(names: Iterable[str], baseline: str = "") -> dict[str, Look]:
    """Colour, marker and line of each, in their order: no two of 20 alike in marker and line; `baseline` as ever."""
    order = dict.fromkeys(names)
    found = {name: _look(place) for place, name in enumerate(name for name in order if name != baseline)}
    return {name: BASELINE if name == baseline else found[name] for name in order}


def _look(place: int) -> Look:
    line = LINES[place // len(COLOURS) % len(LINES)]
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    return {"color": colour, "marker": marker, "ls": line, "lw": 1.1}


def wrapped(label: str, width: int = 46) -> str:
    """In lines that fit beside or below axes."""
    return "\n".join(textwrap.wrap(label, width))


def room_for(labels: Iterable[str], axes: float = 4.2) -> float:
    """Inches of a canvas with `labels` left of `axes` inches of axes."""
    return axes + 0.3 + 0.075 * max(len(line) for label in labels for line in label.split("\n"))


def label_ends(axes: "Axes", ends: Mapping[str, tuple[float, float]], looks: Mapping[str, Look], height: float) -> None:
    """The names of lines right of the axes, each with its marker and a thin line from its end (x, y), moved apart where
    these are close. The limits of the axes are final; they are `height` inches tall.
    """
    start = {name: axes.transLimits.transform(end) for name, end in ends.items()}
    for name, place in spread({name: y for name, (_, y) in start.items()}, LABEL_GAP / 72 / height).items():
        (x, y), look = start[name], looks[name]
        to = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([x, 1.08], [y, place], **{**look, "lw": 0.6}, ms=4, markevery=[1], **to)
        axes.text(1.11, place, name, fontsize=8, va="center", **to)


def hover(axes: "Axes", points: Iterable[tuple[float, float, str]]) -> None:
    """What readers see who point at (x, y) in the SVG: unseen marks, whose addresses `save_figure` makes titles."""
    x, y, texts = zip(*points, strict=True)
    marks = axes.scatter(x, y, s=64, marker="s", color="none", zorder=9)
    marks.set_urls(texts)


def spread(places: Mapping[str, float], gap: float) -> dict[str, float]:
    """Places in [0, 1] at least `gap` apart, in the same order and each as near to its own as the others allow, as far
    as there is room.
    """
    order = sorted(places, key=places.__getitem__)
    groups: list[list[float]] = []  # [sum of wanted first places, members]: neighbours that had to move together
    for index, name in enumerate(order):
        groups.append([places[name] - index * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] >= groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += members
    first = [total / members for total, members in groups for _ in range(int(members))]
    last = max(0.0, 1 - (len(order) - 1) * gap)
    return {name: min(max(at, 0.0), last) + i * gap for i, (name, at) in enumerate(zip(order, first, strict=True))}


def label_points(axes: "Axes", points: Mapping[str, tuple[float, float]], width: float, height: float) -> None:
    """The name of every point beside it, on the first side where it covers neither a point nor another name. The limits
    of the axes, which are so many inches wide and tall, are final.
    """
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    size, inches = 7, (72 * width, 72 * height)
    places = {name: axes.transLimits.transform(point) * inches for name, point in points.items()}
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places.values()]
    for name, (x, y) in places.items():
        wide = 0.62 * size * len(name)
        offsets = [(dx, dy) for dy in (-3, 4, -10, 11, -17) for dx in (5, -5 - wide, -wide / 2)]
        boxes = [(x + dx, y + dy, x + dx + wide, y + dy + 1.1 * size) for dx, dy in offsets]
        inside = [box for box in boxes if box[0] > 0 and box[2] < inches[0] and box[1] > 0] or boxes
        box = next((box for box in inside if not any(_overlap(box, other) for other in taken)), inside[0])
        taken.append(box)
        axes.annotate(name, points[name], (box[0] - x, box[1] - y), textcoords="offset points", fontsize=size)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def plain_log(axis: "Axis") -> None:
    """A logarithmic axis with ticks at 1, 2 and 5 of each decade, written as decimals."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def whole_ticks(axis: "Axis") -> None:
    """Ticks at whole numbers only: of seeds, proposals and their like."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def few_ticks(axis: "Axis") -> None:
    """For panels an inch wide."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(3))


def counted(numbers: Iterable[int], noun: str) -> str:
    """`n = 3 paired seeds`, or `n = 3 to 5 paired seeds` where they differ."""
    low, high = min(found := list(numbers)), max(found)
    return f"n = {'' if low == high else f'{low} to '}{several(high, noun)}"


def save_figure(figure: Figure, folder: Path) -> list[Path]:
    """Draws the figure's .svg and .png, which hold no date and no version, so that bytes repeat."""
    svg, png = (folder / f"{figure.data.name}{suffix}" for suffix in (".svg", ".png"))
    with styled():
        canvas = figure.draw()
        svg.write_text(as_svg(canvas), "utf-8")
        canvas.savefig(png, dpi=150, metadata={"Software": None})
    return [svg, png]


def as_svg(canvas: "Canvas") -> str:
    """With what `hover` says."""
    text = io.StringIO()
    canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    titled = re.sub(r'<a xlink:href="([^"]*)"[^>]*>', r'<g pointer-events="all"><title>\1</title>', text.getvalue())
    return compact_svg(titled.replace("</a>", "</g>"))


def compact_svg(svg: str) -> str:
    """The same picture in fewer bytes than Matplotlib's: no indentation, places to a hundredth of a point, the family
    of all texts said once, and any other style that elements share.
    """
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", svg)
    if family := re.search(r"; font-family: [^;\"]*", svg):
        svg = svg.replace("</style>", f"text{{{family[0].removeprefix('; ')}}}</style>", 1).replace(family[0], "")
    return re.sub(r"\s*\n\s*", "\n", _shared_styles_once(svg))


def _shared_styles_once(svg: str) -> str:
    """As classes, whose names tell what is in them, so that pictures in one page need not avoid each other's. A style
    that points to an id stays with its element, for ids are renamed there.
    """
    count = Counter(style for style in re.findall(r' style="([^"]*)"', svg) if "url(" not in style)
    names = {style: f"s{sha256(style.encode()).hexdigest()[:6]}" for style, times in count.items() if times > 1}
    classes = "".join(f".{name}{{{style}}}" for style, name in names.items())
    styled = re.sub(
        r' style="([^"]*)"', lambda found: f' class="{names[found[1]]}"' if found[1] in names else found[0], svg
    )
    return styled.replace("</style>", f"{classes}</style>", 1)
