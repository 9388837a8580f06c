"""Families of models at several sizes and lengths: a power law through each, what it says of a size it has not seen, of
the speed-up of one family over the other at equal loss, and of the paper's 0.6B.

Shape suffixes: F fits of a law, as in moepp/statistics/power_law.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moepp.reports.results import SweepResults
from moepp.statistics.claims import Claim
from moepp.statistics.power_law import PARAMETERS, PowerLaw, fit_power_law, interval, tokens_ratio_F
from moepp.statistics.resampling import Interval
from moepp.statistics.seeds import mean_interval
from moepp.statistics.tables import Table

FAMILIES = {"vanilla": "vanilla MoE", "moepp": "MoE++"}
PAPER_SIZE, PAPER_TOKENS = 0.6e9, 100e9  # total parameters and tokens of the paper's 0.6B
INTERVAL = "low", "high"


@dataclass(frozen=True, eq=False)
class Rung:
    """One family's runs at one size and length."""

    family: str
    rung: str
    size: float  # total parameters
    tokens: float
    flops: float  # of the forward pass, per token, as measured
    loss: Mapping[int, float]  # by seed


def rungs_of(results: SweepResults) -> Iterable[Rung]:
    """Arms are called FAMILY_RUNG."""
    for arm in results.runs:
        family, _, rung = arm.partition("_")
        for runs in results.at_lengths(arm).values():
            if runs:
                first = next(iter(runs.values()))
                about = [first.value(name) for name in ("total_params", "tokens", "flops_per_token")]
                yield Rung(family, rung, *about, {seed: run.value("val_loss") for seed, run in sorted(runs.items())})


def laws_of(rungs: Sequence[Rung]) -> tuple[dict[str, PowerLaw], list[str]]:
    """Of both families, and why one has none; each with random numbers of its own, for the laws are compared."""
    laws, notes = {}, []
    for seed, (family, name) in enumerate(FAMILIES.items()):
        try:
            laws[family] = fit_power_law(*_columns(rungs, family), seed=seed)
        except ValueError as error:
            notes.append(f"No law of {name}: {error}.")
    return laws, notes


def _columns(rungs: Sequence[Rung], family: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """What `fit_power_law` takes; the lengths of one trunk are a block."""
    rows = [
        (one.size, one.tokens, loss, f"{one.rung} {seed}")
        for one in rungs if one.family == family
        for seed, loss in one.loss.items()
    ]  # fmt: skip
    *numbers, blocks = zip(*rows, strict=True) if rows else ((),) * 4
    return (*(np.array(column, float) for column in numbers), list(blocks))


def parameter_table(laws: Mapping[str, PowerLaw], rungs: Sequence[Rung]) -> Table:
    rows = []
    for family, law in laws.items():
        n = sum(len(one.loss) for one in rungs if one.family == family)
        rows += [
            (FAMILIES[family], n, name, *_ends(interval(values_F)))
            for name, values_F in zip(PARAMETERS, law.fits_FP.T, strict=True)
        ]
    units = "; ".join(f"{FAMILIES[f]}: N0 = {law.scale[0]:.3g}, D0 = {law.scale[1]:.3g}" for f, law in laws.items())
    caption = (
        "The laws, L = E + A (N / N0)^-a + B (D / D0)^-b, of N parameters and D tokens, in nats per token, with 95 %"
        f" bootstrap intervals over n runs ({units})."
    )
    return Table("law", caption, ("family", "n", "parameter", "value", *INTERVAL), tuple(rows))


def _ends(found: Interval) -> tuple[float, float, float]:
    return found.value, found.low, found.high


def held_out(rungs: Sequence[Rung]) -> tuple[Table, list[Claim]]:
    """What the laws of all smaller sizes say of the largest, and by how much its runs miss that."""
    top = max(rungs, key=lambda one: one.size).rung
    laws, rows, claims = laws_of([one for one in rungs if one.rung != top])[0], [], []
    for family, law in laws.items():
        name = FAMILIES[family]
        for one in (one for one in rungs if (one.family, one.rung) == (family, top)):
            said_F, seen_F = law.losses_F(one.size, one.tokens), _other_seeds(one, len(law.fits_FP))
            miss = interval(seen_F - said_F)
            rows.append(
                (name, one.size, one.tokens, len(one.loss), *_ends(interval(said_F)), float(seen_F[0]), *_ends(miss))
            )
            verdict = "undecided" if len(one.loss) < 2 else "holds" if miss.low <= 0 <= miss.high else "fails"
            said = f"the law of the smaller sizes foretells {name} of rung {top} after {one.tokens:,.0f} tokens, off by"
            claims.append(Claim(said, verdict, *_ends(miss), "nats per token"))
    caption = (
        "The largest size, which these laws have not seen, nats per token: what they say, the mean over n seeds, and"
        " what it is off by. 95 % intervals; the last has the scatter of seeds in it."
    )
    columns = ("family", "parameters", "tokens", "n", "predicted", *INTERVAL, "loss", "off by", "off low", "off high")
    return Table("held_out", caption, columns, tuple(rows)), claims


def _other_seeds(one: Rung, fits: int) -> np.ndarray:
    """The mean over seeds, and what it might have been with others (Student's t); of one seed nothing is known."""
    found = mean_interval(list(one.loss.values()))
    if found.std is None:
        return np.full(fits, found.mean)
    drawn_F = np.random.default_rng(0).standard_t(found.n - 1, fits) * found.error
    drawn_F[0] = 0.0
    return found.mean + drawn_F


def compute_ratios(rungs: Sequence[Rung], laws: Mapping[str, PowerLaw]) -> dict[Rung, np.ndarray]:
    """Of each of MoE++'s: training FLOPs of vanilla MoE of the same rung over its own at equal loss, by every fit; none
    where a family has no law.
    """
    if laws.keys() != FAMILIES.keys():
        return {}
    base = {(one.rung, one.tokens): one for one in rungs if one.family == "vanilla"}
    found = {}
    for ours in sorted((one for one in rungs if one.family == "moepp"), key=lambda one: (one.size, one.tokens)):
        if theirs := base.get((ours.rung, ours.tokens)):
            tokens_F = tokens_ratio_F(laws["vanilla"], laws["moepp"], theirs.size, ours.size, ours.tokens)
            found[ours] = tokens_F * theirs.flops / ours.flops
    return found


def growth(ratios: Mapping[Rung, np.ndarray]) -> str:
    """Whether the speed-up grows: with size after the most tokens, and with tokens at the largest size."""
    order = sorted(ratios, key=lambda one: (one.size, one.tokens))
    large = order[-1]
    small = next(one for one in reversed(order) if one.rung == order[0].rung)
    short = next(one for one in order if one.rung == large.rung)
    ends = " and ".join(f"{_said(interval(ratios[one]))} at {one.size:,.0f} parameters" for one in (small, large))
    return (
        f"For the loss of MoE++ after {large.tokens:,.0f} tokens vanilla MoE needs this many times its training FLOPs:"
        f" {ends}. With size this {_trend(interval(ratios[large] / ratios[small]))}; with tokens, from"
        f" {short.tokens:,.0f} on at the largest size, it {_trend(interval(ratios[large] / ratios[short]))}."
    )


def _said(found: Interval) -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def _trend(factor: Interval) -> str:
    verb = "grows" if factor.low > 1 else "shrinks" if factor.high < 1 else "cannot be told to grow or shrink"
    return f"{verb}: by a factor of {_said(factor)}"


def speedup_table(ratios: Mapping[Rung, np.ndarray]) -> Table:
    rows = [(one.rung, one.size, one.tokens, len(one.loss), *_ends(interval(of_F))) for one, of_F in ratios.items()]
    caption = (
        "Effective speed-up of MoE++: training FLOPs (as measured) of vanilla MoE over its own at equal loss, by the"
        " two laws, with 95 % bootstrap intervals; above 1 MoE++ is ahead, infinite where vanilla MoE never gets"
        " there. n seeds of each stand in the laws."
    )
    return Table("", caption, ("rung", "parameters", "tokens", "n", "compute", *INTERVAL), tuple(rows))


def prediction_table(laws: Mapping[str, PowerLaw]) -> Table:
    rows = [
        (f"loss of {FAMILIES[family]}, nats per token", *_ends(interval(law.losses_F(PAPER_SIZE, PAPER_TOKENS))))
        for family, law in laws.items()
    ]
    tokens_F = tokens_ratio_F(laws["vanilla"], laws["moepp"], PAPER_SIZE, PAPER_SIZE, PAPER_TOKENS)
    rows.append(("tokens of vanilla MoE over MoE++'s at equal loss", *_ends(interval(tokens_F))))
    caption = (
        f"What the laws say of the paper's 0.6B ({PAPER_SIZE:.1g} parameters, {PAPER_TOKENS:.0g} tokens), on this text"
        " and vocabulary. The 95 % bootstrap intervals hold as far as the laws do, which here is five orders of"
        " magnitude of tokens."
    )
    return Table("prediction", caption, ("of the paper's 0.6B", "predicted", *INTERVAL), tuple(rows))
