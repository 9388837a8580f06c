"""One worker of a search through fake trials, for the test that kills it: `python run_fake_search.py RUNS`."""

import sys

from run_fake_sweep import FAKE_TRIAL, no_preparation, sweep

from moepp.data import prepare as preparation
from moepp.sweeps.runner import run_sweep

preparation.prepare = no_preparation
toy = sweep(retries=5, vanilla=["model=vanilla"], moepp=["model=moepp"])
toy.space = {"tpe": {"n": 3, "keys": {"optim.lr": {"float": [1e-4, 1e-2], "log": True}}}}
run_sweep(
    toy, "smoke", 2, [f"runs={sys.argv[1]}", "trainer.steps=20"],
    progress=False, command=FAKE_TRIAL, one_share=True, stale=2.0,
)  # fmt: skip
