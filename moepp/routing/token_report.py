"""Tables, figures and claims on FFN experts per token by part of speech, part of a word and token string (Fig. 5)."""

from collections.abc import Mapping, Sequence

import numpy as np

from moepp.routing.tokens import (
    LabelUse,
    TokenUse,
    at_equal_frequency,
    by_label,
    difference,
    frequency_class,
    loss_correlation,
)
from moepp.statistics.claims import Claim
from moepp.statistics.hypotheses import Effect, Hypothesis, decide, over_models
from moepp.statistics.resampling import Interval
from moepp.statistics.style import BLUE, GREY, INK, Figure, axes_of
from moepp.statistics.tables import Cell, Table

Uses = Mapping[str, TokenUse]  # of every model over the same tokens
WHOLE, FRAGMENT = "whole word", "fragment"  # parts of words with a letter: the only ones counted as words here
VERB_TAG, AUXILIARY_TAG, NOUN_TAG = "VERB", "AUX", "NOUN"  # the paper's verbs include "will" and "is": auxiliaries
LEAST_TOKENS = 30  # of a string, to be drawn; the CSV has them all
NAMED = 36  # strings named in the figure, about as many as the paper shows, evenly spread in rank
COLUMNS = ("tokens", "texts", "FFN experts per token", "low", "high")


def tag_table(uses: Uses) -> Table | None:
    """By part of speech and part of the word; None without tags."""
    first = next(iter(uses.values()))
    if not (first.tag_T != "").any():
        return None
    labels = {
        name: np.where(use.tag_T == "", "", np.char.add(np.char.add(use.tag_T, "|"), use.part_T))
        for name, use in uses.items()
    }
    words = [(*label.split("|"), *numbers) for label, *numbers in _rows(uses, labels)]
    every = [(label, "all", *numbers) for label, *numbers in _rows(uses, {n: use.tag_T for n, use in uses.items()})]
    return Table("tags", f"FFN experts per token by part of speech, auxiliary verbs apart. {_interval(uses)}",
                 ("part of speech", "part of the word", *COLUMNS), tuple([*every, *words]))  # fmt: skip


def part_table(uses: Uses) -> Table:
    """Whole words against fragments, and what is neither."""
    rows = _rows(uses, {name: use.part_T for name, use in uses.items()})
    caption = (
        "FFN experts per token by part of a word. Punctuation and numbers hold no letter and are no words here."
        f" {_interval(uses)}"
    )
    return Table("parts", caption, ("part", *COLUMNS), tuple(rows))


def paper_table(uses: Uses, paper: Mapping[str, float]) -> Table:
    """The paper's strings with ours, as the beginning of a word or alone ("␣x") and without a blank before it ("x")."""
    found = {row[0]: (row[1], *row[3:]) for row in _rows(uses, {name: use.string_T for name, use in uses.items()})}
    forms = ("␣x", "x")
    rows = [
        (string, value, *(cell for form in forms for cell in found.get(form.replace("x", string), (None,) * 4)))
        for string, value in paper.items()
    ]
    columns = (f"{form}: {name}" for form in forms for name in ("tokens", *COLUMNS[2:]))
    caption = (
        "FFN experts per token of the paper's strings, its own and ours: tokens that begin with a blank (␣x) and tokens"
        f" that do not (x). A dash: no token of these texts, or too few texts for an interval. {_interval(uses)}"
    )
    return Table("paper_strings", caption, ("string", "paper", *columns), tuple(rows))


def paper_plot(table: Table) -> Figure:
    """Dots with intervals, in the paper's order."""

    def draw():
        figure, axes = axes_of(width=9.0, height=3.8)
        place = np.arange(len(table.rows))
        axes.plot(place, [row[1] for row in table.rows], "_", color=INK, ms=9, mew=2, label="paper")
        for first, shift, look, label in (
            (3, -0.15, {"fmt": "o", "color": BLUE}, "ours, ␣x"),
            (7, 0.15, {"fmt": "s", "color": GREY, "mfc": "white"}, "ours, x"),
        ):
            value, low, high = (
                np.array([np.nan if row[first + i] is None else row[first + i] for row in table.rows], dtype=float)
                for i in range(3)
            )
            axes.errorbar(place + shift, value, yerr=[value - low, high - value], ms=4, lw=1, label=label, **look)
        axes.set_xticks(place, [row[0] for row in table.rows], rotation=90)
        axes.set_ylabel("FFN experts per token")
        axes.figure.legend(loc="outside upper center", ncols=3)
        return figure

    return Figure(table, draw)


def string_plot(uses: Uses) -> Figure:
    """Every token string by rank; those that are drawn and named are chosen by count and rank alone."""
    rows = _rows(uses, {name: use.string_T for name, use in uses.items()})
    caption = (
        f"FFN experts per token by token string, highest first: strings with at least {LEAST_TOKENS} tokens, names"
        f" evenly spread in rank; the data hold all {len(rows)} strings. {_interval(uses)}"
    )
    return strings_figure(rows, caption)


def strings_figure(rows: Sequence[Sequence[Cell]], caption: str) -> Figure:
    """Of all strings, those with many tokens and an interval are drawn."""
    drawn = [row for row in rows if row[1] >= LEAST_TOKENS and row[4] is not None]

    def draw():
        figure, axes = axes_of(width=9.0, height=3.6)
        rank = np.arange(len(drawn))
        low, value, high = (np.array([row[column] for row in drawn], dtype=float) for column in (4, 3, 5))
        axes.fill_between(rank, low, high, color="0.85", lw=0, label="95 % interval")
        axes.plot(rank, value, color=BLUE, lw=1.2, label="mean")
        if drawn:
            named = np.unique(np.linspace(0, len(drawn) - 1, NAMED).astype(int))
            axes.plot(named, value[named], "o", color=BLUE, ms=3)
            axes.set_ylim(0, 1.2 * value.max())  # intervals of two or three models may reach beyond
            axes.set_xticks(named, [_drawable(drawn[i][0]) for i in named], rotation=90, fontsize=7)
        axes.set_xlabel("token string, by rank")
        axes.set_ylabel("FFN experts per token")
        axes.legend()
        return figure

    return Figure(Table("strings", caption, ("string", *COLUMNS), tuple(rows)), draw)


def _drawable(string: str) -> str:
    """Characters that no common font of a plotting library has become boxes."""
    return "".join(character if ord(character) < 0x3000 else "□" for character in string)


def label_plot(table: Table, name: str, label: str) -> Figure:
    """Bars with intervals; of a table with parts of words, whole words beside later fragments."""
    rows = [row for row in table.rows if label != "part of speech" or row[1] == "all"]

    def draw():
        figure, axes = axes_of(width=6.4, height=1.0 + 0.28 * len(rows))
        value, low, high = (
            np.array([np.nan if row[column] is None else row[column] for row in rows], dtype=float)
            for column in (-3, -2, -1)
        )
        axes.barh(range(len(rows)), value, 0.7, color="0.85", edgecolor=INK, lw=0.6)
        axes.errorbar(value, range(len(rows)), xerr=[value - low, high - value], fmt="none", color=GREY, capsize=3)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1.5 * np.nanmax(value))
        axes.set_xlabel("FFN experts per token")
        return figure

    return Figure(Table(name, table.caption, table.columns, tuple(rows)), draw)


def frequency_table(uses: Uses) -> Table:
    """By how frequent a token's string is in these texts, with the loss of its tokens."""
    labels = {name: np.char.add("class ", frequency_class(use.string_T).astype(str)) for name, use in uses.items()}
    nats = {
        label: float(np.mean([use.nats_T[labels[name] == label].mean() for name, use in uses.items()]))
        for label in np.unique(next(iter(labels.values())))
    }
    rows = sorted((*row, nats[row[0]]) for row in _rows(uses, labels))
    caption = (
        "FFN experts per token by how frequent the token's string is in these texts: classes of about equally many"
        f" tokens, rarest first, with the mean loss of their tokens. {_interval(uses)}"
    )
    return Table("frequency", caption, ("frequency", *COLUMNS, "nats per token"), tuple(rows))


def token_claims(uses: Uses) -> tuple[Claim, ...]:
    """The paper's statements on verbs, nouns and fragments, as far as the tags allow; the same at equal frequency; and
    whether it is loss that FFN experts follow.
    """
    equal = {name: at_equal_frequency(use) for name, use in uses.items()}
    tests = []
    for hypothesis, masks, of in (
        (VERBS, lambda use: (_tagged(use, VERB_TAG), _other_words(use)), uses),
        (AUXILIARIES, lambda use: (_tagged(use, AUXILIARY_TAG), _other_words(use)), uses),
        (VERBS_OVER_NOUNS, lambda use: (_tagged(use, VERB_TAG), _tagged(use, NOUN_TAG)), uses),
        (FRAGMENTS, lambda use: (_fragment(use), use.part_T == WHOLE), uses),
        (FRAGMENTS_WITHIN, _within_nouns, uses),
        (VERBS_AT_FREQUENCY, lambda use: (_tagged(use, VERB_TAG), _other_words(use)), equal),
        (FRAGMENTS_AT_FREQUENCY, lambda use: (_fragment(use), use.part_T == WHOLE), equal),
    ):
        effects = [_effect(use, masks(use)) for use in of.values()]
        if None not in effects:
            tests.append((hypothesis, effects))
    for hypothesis, within in ((LOSS, False), (LOSS_WITHIN, True)):
        tests.append((hypothesis, [loss_correlation(use, within) for use in uses.values()]))
    return decide(tests)


UNIT = "FFN experts per token"
EQUAL = "whole words only; both relative to tokens that are about as frequent in these texts"
VERBS = Hypothesis(
    f"Verbs ({VERB_TAG}) use more FFN experts than other words", UNIT, above=0.0,
    paper="verbs most; its strings were chosen by hand", note="whole words only, auxiliaries on neither side",
)  # fmt: skip
AUXILIARIES = Hypothesis(
    f"Auxiliary verbs ({AUXILIARY_TAG}) use more FFN experts than other words", UNIT, above=0.0,
    paper="will 1.76, is 1.72", note="whole words only, other verbs on neither side",
)  # fmt: skip
VERBS_OVER_NOUNS = Hypothesis(
    f"Verbs ({VERB_TAG}) use more FFN experts than nouns ({NOUN_TAG})", UNIT, above=0.0,
    paper="nouns 1.5 to 1.7, verbs above", note="whole words only",
)  # fmt: skip
FRAGMENTS = Hypothesis(
    "Word fragments use fewer FFN experts than whole words", UNIT, below=0.0, paper="fragments below 1.5",
)  # fmt: skip
FRAGMENTS_WITHIN = Hypothesis(
    "Nouns that are split use fewer FFN experts than nouns that are not", UNIT, below=0.0,
    paper="not examined", note="the same comparison within one part of speech",
)  # fmt: skip
VERBS_AT_FREQUENCY = Hypothesis(
    f"Verbs ({VERB_TAG}) use more FFN experts than other words of the same frequency", UNIT, above=0.0,
    paper="not examined", note=EQUAL,
)  # fmt: skip
FRAGMENTS_AT_FREQUENCY = Hypothesis(
    "Word fragments use fewer FFN experts than whole words of the same frequency", UNIT, below=0.0,
    paper="not examined", note="both relative to tokens that are about as frequent in these texts",
)  # fmt: skip
LOSS = Hypothesis(
    "Tokens with a higher loss use more FFN experts", "rho over tokens", above=0.0, paper="not examined",
)  # fmt: skip
LOSS_WITHIN = Hypothesis(
    "A token uses more FFN experts where its loss is higher than its string's usual one", "rho over tokens", above=0.0,
    paper="not examined", note="within each string, so that neither its frequency nor its form can make it",
)  # fmt: skip


def _tagged(use: TokenUse, tag: str) -> np.ndarray:
    return (use.tag_T == tag) & (use.part_T == WHOLE)


def _other_words(use: TokenUse) -> np.ndarray:
    return (use.part_T == WHOLE) & ~np.isin(use.tag_T, ("", VERB_TAG, AUXILIARY_TAG))


def _fragment(use: TokenUse) -> np.ndarray:
    return np.char.endswith(use.part_T, FRAGMENT)


def _within_nouns(use: TokenUse) -> tuple[np.ndarray, np.ndarray]:
    noun = use.tag_T == NOUN_TAG
    return noun & _fragment(use), noun & (use.part_T == WHOLE)


def _effect(use: TokenUse, masks: tuple[np.ndarray, np.ndarray]) -> Effect | None:
    return difference(use, *masks) if all(mask.any() for mask in masks) else None


def _interval(uses: Uses) -> str:
    return f"Intervals are 95 % over {'texts' if len(uses) == 1 else f'{len(uses)} models (Students t)'}."


def _rows(uses: Uses, labels: Mapping[str, np.ndarray]) -> list[tuple[Cell, ...]]:
    """Label, tokens, texts, and the mean over models with its interval; most FFN experts first."""
    found = [{one.label: one for one in by_label(use, labels[name])} for name, use in uses.items()]
    rows = [_row(label, [by_name[label] for by_name in found]) for label in found[0]]
    return sorted(rows, key=lambda row: -row[3])


def _row(label: str, found: Sequence[LabelUse]) -> tuple[Cell, ...]:
    ffn: Interval = over_models([one.ffn for one in found])
    ends = (None if np.isnan(end) else float(end) for end in (ffn.low, ffn.high))
    return label, found[0].tokens, found[0].texts, float(ffn.value), *ends
