"""`run.py demo`: a tiny MoE++ and a vanilla MoE learn side by side, and a page shows what came of it: both losses, and
a sentence by the FFN experts that each of its tokens got.
"""

import html
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from string import Template

import numpy as np
from tokenizers import Tokenizer

from moepp.records import write_text
from moepp.routing.texts import Text
from moepp.routing.traces import ffn_and_nats, trace
from moepp.statistics.style import axes_of, looks, styled
from moepp.sweeps.spec import Scale, Sweep
from moepp.terminal import working
from moepp.training.loading import LoadedRun, load_sweep

SCALE, VANILLA, MOEPP = "laptop", "vanilla", "moepp"
NAMES = {VANILLA: "vanilla MoE", MOEPP: "MoE++"}
SWEEP = Sweep(
    name="demo",
    question="What does a tiny MoE++ do that a vanilla MoE does not?",
    base=[
        "size=tiny", "recipe=tuned", "data=sotu", "tracking=jsonl", "trainer.steps=150", "optim.warmup_steps=40",
        "trainer.val_every=25", "trainer.log_every=5", "trainer.checkpoint_every=75", "trainer.expert_timing=false",
        "data.val_sequences=48",
    ],
    scales={SCALE: Scale()},
    baseline=VANILLA,
    arms={VANILLA: ["model=vanilla"], MOEPP: ["model=moepp"]},
)  # fmt: skip
SENTENCE = (
    "Fellow citizens of the Senate and of the House of Representatives: in 1790 the treaty with the Choctaw nation was"
    " ratified, and the people of the United States paid their taxes in gold."
)
PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MoE++ and a vanilla MoE</title>
<style>
  body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.6 system-ui, sans-serif; }
  body { color: #1a1a1a; background: #fff; }
  svg { width: 100%; height: auto; }
  .tokens { line-height: 2.1; font-size: 1.1rem; }
  .tokens span { padding: 0.25em 0; white-space: pre-wrap; }
</style>
<h1>MoE++ and a vanilla MoE</h1>
<p>$losses</p>
$curves
<h2>Who gets how much compute</h2>
<p>$compute</p>
<p class="tokens">$tokens</p>
<p class="tokens">$legend</p>
<p>One seed and $steps steps each: enough to see them learn, too little to say which is better.
<code>reproduce table5</code> compares them with several seeds, intervals and the paper's numbers.</p>
</html>
""")


def demo(overrides: Sequence[str] = ()) -> Path:
    """Trains what is not trained yet, in less than a minute on two cores; returns the page."""
    from moepp.sweeps.runner import run_sweep

    directory = run_sweep(SWEEP, SCALE, extra=overrides)
    arms = load_sweep(directory).arms
    page = directory / "demo.html"
    with working("drawing the page"):
        write_text(page, demo_page({arm: next(iter(arms[arm].values())) for arm in NAMES}))
    return page


def demo_page(runs: Mapping[str, LoadedRun]) -> str:
    """The page, from a finished run of each arm."""
    moepp = runs[MOEPP]
    most = moepp.config.model.top_k
    pieces, used_S = ffn_of_tokens(moepp, SENTENCE)
    finals = [f"{name} {runs[arm].final['val_bits_per_byte']:.3f}" for arm, name in NAMES.items()]
    return PAGE.substitute(
        losses=f"Bits per byte of held-out text after {moepp.config.trainer.steps} steps: {', '.join(finals)}.",
        curves=_curves(runs),
        compute=f"A vanilla MoE gives every token {most} FFN experts in each layer. Here MoE++ gave the tokens of this"
        f" sentence {used_S.mean():.2f} on average; the others went to zero, copy and constant experts, which cost next"
        " to nothing. The darker, the more (point at a token for its number).",
        tokens=_coloured(pieces, used_S, most),
        legend=_coloured([f" {value:g} " for value in (0, most / 2, most)], (0, most / 2, most), most),
        steps=moepp.config.trainer.steps,
    )


def ffn_of_tokens(run: LoadedRun, sentence: str) -> tuple[list[str], np.ndarray]:
    """The pieces of a sentence that are its tokens, and the FFN experts that each got, mean over MoE layers [S]."""
    ids, pieces = _tokens(run.tokenizer, sentence)
    text = Text(np.array(ids), np.array([len(piece.encode()) for piece in pieces]), group="")
    traces = trace(run.model, [text], run.end_of_text, run.config.data.seq_len)
    [used_S], _ = ffn_and_nats(run.model, [text], traces)
    return pieces, used_S


def _tokens(tokenizer: Tokenizer, sentence: str) -> tuple[list[int], list[str]]:
    """Ids, and the piece of the sentence from where the token before ends."""
    encoding = tokenizer.encode(sentence)
    ends = [0, *(end for _, end in encoding.offsets)]
    return encoding.ids, [sentence[start:end] for start, end in pairwise(ends)]


def _coloured(pieces: Sequence[str], values: Sequence[float], most: float) -> str:
    looks = [f'style="background: rgb(86 180 233 / {value / most:.2f})" title="{value:.2f}"' for value in values]
    return "".join(f"<span {look}>{html.escape(piece)}</span>" for look, piece in zip(looks, pieces, strict=True))


def _curves(runs: Mapping[str, LoadedRun]) -> str:
    """Training and validation loss over tokens, as an SVG element."""
    with styled():
        figure, axes = axes_of(width=7.2, height=3.4)
        for arm, look in looks(NAMES, VANILLA).items():
            axes.plot(*_series(runs[arm], "train/loss"), color=look["color"], lw=0.7, alpha=0.5)
            axes.plot(*_series(runs[arm], "val/loss"), ms=4, label=f"{NAMES[arm]}, held-out text", **look)
        axes.set_xlabel("training tokens, thousands (thin: loss in training)")
        axes.set_ylabel("loss, nats per token")
        axes.legend()
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue().partition("<svg")[1] + drawn.getvalue().partition("<svg")[2]


def _series(run: LoadedRun, name: str) -> tuple[list[float], list[float]]:
    data = run.config.data
    points = [
        (line["step"] * data.batch_size * data.seq_len / 1000, line[name]) for line in run.metrics if name in line
    ]
    return [tokens for tokens, _ in points], [value for _, value in points]
