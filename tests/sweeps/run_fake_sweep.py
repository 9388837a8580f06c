"""A whole runner process for the tests that kill or interrupt one: `python run_fake_sweep.py RUNS [OPTIONS]`.

OPTIONS is JSON: options of run_sweep, and `arms` as the number of arms in place of the two of the toy sweep. `extra`
comes after what is set here.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from moepp.data import prepare as preparation
from moepp.errors import RunError
from moepp.process import die_with_parent
from moepp.sweeps.runner import run_sweep
from moepp.sweeps.spec import Scale, Sweep

FAKE_TRIAL = (sys.executable, str(Path(__file__).with_name("fake_trial.py")))


def no_preparation(config):
    """In place of prepare: the fake trials read no tokens."""
    return SimpleNamespace(header=SimpleNamespace(digest="0123456789abcdef"))


def sweep(retries=1, match="tokens", **arms) -> Sweep:
    arms = arms or {"top1": ["model.top_k=1"], "top2": {"model": {"top_k": 2}}}
    scales = {"smoke": Scale(set=["size=smoke", "trainer.steps=4", "tracking=jsonl"])}
    return Sweep(
        name="toy", question="Which?", base=["model=vanilla", "model.gate=softmax"], scales=scales,
        baseline=next(iter(arms)), arms=arms, retries=retries, match=match,
    )  # fmt: skip


def arms(count):
    return {f"lr{i}": [f"optim.lr={i + 1}e-4"] for i in range(count)}


if __name__ == "__main__":
    die_with_parent()
    preparation.prepare = no_preparation
    options = {"workers": 2} | json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}")
    toy = sweep(options.pop("retries", 1), **arms(options.pop("arms", 0)))
    extra = [f"runs={sys.argv[1]}", "trainer.steps=20", *options.pop("extra", [])]
    try:
        run_sweep(toy, "smoke", extra=extra, command=FAKE_TRIAL, **options)
    except RunError as error:
        print(f"error: {error}")
        sys.exit(error.exit_code)
