"""Where the text of a drawn SVG lies, for tests that none of it is cut or covered."""

import re
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


@dataclass(frozen=True)
class Box:
    """Of one line of text, upright or turned by a right angle; y grows downwards."""

    text: str
    left: float
    top: float
    right: float
    bottom: float

    def covers(self, other: "Box", slack: float = 0.5) -> bool:
        beside = self.right - slack <= other.left or other.right - slack <= self.left
        return not beside and self.top + slack < other.bottom and other.top + slack < self.bottom


def faults(svg: str) -> list[str]:
    """Every text that leaves the canvas, and every two that share a place."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.get("viewBox").split())
    classes = dict(re.findall(r"\.(\w+)\{([^}]*)\}", "".join(sheet.text for sheet in root.iter(f"{SVG}style"))))
    styles = {e: e.get("style") or classes.get(e.get("class", ""), "") for e in root.iter(f"{SVG}text")}
    boxes = [_box(element, style) for element, style in styles.items()]
    cut = [b.text for b in boxes if b.left < -0.5 or b.top < -0.5 or b.right > width + 0.5 or b.bottom > height + 0.5]
    pairs = [f"{a.text} / {b.text}" for a, b in combinations(boxes, 2) if a.covers(b)]
    return [*(f"cut: {text}" for text in cut), *(f"overlap: {pair}" for pair in pairs)]


def _box(element: ElementTree.Element, style: str) -> Box:
    text = "".join(element.itertext()).strip()
    size = float(re.search(r"([\d.]+)px", style)[1])
    width = _width(text, size, "bold" in style or "700" in style)
    start = {"middle": -0.5, "end": -1.0}.get(_anchor(style), 0.0) * width
    x, y, turn = _place(element)
    across, up = (start, start + width), (-0.75 * size, 0.1 * size)  # letters above and below the line they stand on
    if turn == 0:
        return Box(text, x + across[0], y + up[0], x + across[1], y + up[1])
    assert abs(turn) == 90, f"{text} is turned by {turn}"
    return Box(text, x + up[0], y - across[1], x + up[1], y - across[0])


def _anchor(style: str) -> str:
    found = re.search(r"text-anchor: (\w+)", style)
    return found[1] if found else "start"


def _place(element: ElementTree.Element) -> tuple[float, float, float]:
    """x, y and the angle in degrees."""
    transform = element.get("transform", "")
    moved, turned = (re.search(rf"{name}\(([^)]*)\)", transform) for name in ("translate", "rotate"))
    x, y = (float(element.get(axis, 0)) for axis in "xy")
    if moved:
        x, y = (float(number) for number in NUMBERS.findall(moved[1]))
    return x, y, float(NUMBERS.search(turned[1])[0]) if turned else 0.0


@cache
def _width(text: str, size: float, bold: bool) -> float:
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.ft2font import LoadFlags

    font = get_font(findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")))
    font.set_size(size, 72)
    font.set_text(text, flags=LoadFlags.NO_HINTING)
    return font.get_width_height()[0] / 64
