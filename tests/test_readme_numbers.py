"""Tables of arms in README and docs/results.md show what the committed results hold, rounded once: 1.7049 is 1.70, and
not the 1.71 that comes of 1.705.
"""

import csv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md")
COLUMNS = {  # of their tables -> metric of table.csv, decimals
    "validation loss": ("val_loss", ".3f"),
    "minus vanilla": ("difference", "+.3f"),
    "bits per byte": ("val_bits_per_byte", ".3f"),
    "FFN experts per token": ("ffn_per_token", ".2f"),
}


def tables(text):
    """Header and rows of every table."""
    blocks, block = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append([cell.strip() for cell in line.strip("|").split("|")])
        elif block:
            blocks.append(block)
            block = []
    return [(head, rows) for head, _, *rows in blocks]


def shown_tables(first_column):
    found = (table for page in PAGES for table in tables((ROOT / page).read_text()))
    return [(head, rows) for head, rows in found if head[0] == first_column]


def once_rounded(row, metric, form):
    if not row.get(metric):
        return "–"
    value, half_width = float(row[metric]), (float(row[f"{metric}_high"]) - float(row[f"{metric}_low"])) / 2
    return f"{value:{form}} ± {half_width:{form.removeprefix('+')}}"


def differing(head, rows, committed):
    """The cells that are not those of a committed table; None where it lacks an arm."""
    by_arm = {row.get("arm"): row for row in committed}
    if not all(row[0] in by_arm for row in rows):
        return None
    found = []
    for row in rows:
        for name, cell in zip(head, row, strict=True):
            if name in COLUMNS:
                wanted, shown = once_rounded(by_arm[row[0]], *COLUMNS[name]), cell.rstrip("†‡≈§")
                found += [] if shown in (wanted, wanted.partition(" ±")[0]) else [f"{row[0]}: {shown}, not {wanted}"]
    return found


def test_pages_show_committed_numbers_rounded_once():
    files = sorted(ROOT.glob("results/*/*/table.csv"))
    committed = [list(csv.DictReader(file.open())) for file in files]
    for head, rows in shown_tables("arm"):
        if COLUMNS.keys() & set(head):
            candidates = [found for each in committed if (found := differing(head, rows, each)) is not None]
            assert [] in candidates, min(candidates, key=len, default="no committed table has these arms")


def test_pages_show_the_committed_speed_of_layers_on_a_gpu():
    committed = {
        (row["experts"], row["tau"]): row
        for row in csv.DictReader((ROOT / "results/bench_layer/h200/table.csv").open())
        if (row["tokens"], row["direction"]) == ("65536", "forward+backward")
    }
    pages = shown_tables("FFN experts + others")
    for head, rows in pages:
        for experts, *cells in rows:
            for name, cell in zip(head[1:], cells, strict=True):
                if not name.startswith("tau"):
                    continue
                row = committed[experts.removesuffix(", narrow"), name.removesuffix(" (paper)").removeprefix("tau ")]
                paper = f"{float(row['paper_speedup']):.2f}" if row["paper_speedup"] else "–"
                assert cell == f"{float(row['speedup']):.2f} ({paper})"
    assert len(pages) == 2


def test_a_cell_that_was_rounded_twice_is_found():
    row = {"arm": "a", "val_loss": "4.76245", "val_loss_low": "4.64245", "val_loss_high": "4.88245"}
    head = ["arm", "validation loss"]
    assert differing(head, [["a", "4.762 ± 0.120"]], [row]) == []
    assert differing(head, [["a", "4.763 ± 0.120"]], [row]) == ["a: 4.763 ± 0.120, not 4.762 ± 0.120"]
    assert differing(head, [["b", "4.762"]], [row]) is None
