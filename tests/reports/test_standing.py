from dataclasses import replace

import pytest
from moepp.experiments.fig6 import EXPERIMENT as FIG6
from synthetic_sweep import write_sweep

from moepp.reports.experiment import Findings
from moepp.reports.report import write_report
from moepp.reports.results import load_sweep_results
from moepp.reports.standing import Standing, references_of, standing

REFERENCES = {"unigram": 6.37, "bigram": 4.54, "trigram": 4.33}
MADE = {"command": "x", "scale": "laptop", "hardware": {}}


def test_ngrams_are_of_what_the_run_has_seen_and_kept_in_its_record(token_folder, tmp_path):
    run = load_sweep_results(write_sweep(tmp_path, {"vanilla": {0: 3.0}})).runs["vanilla"][0]
    config = {
        "data.corpus": "tokens", "data.path": str(token_folder), "data.digest": "feedfacefeedface", "data.seq_len": 32,
        "data.batch_size": 8, "data.val_sequences": 0, "trainer.steps": 12, "seed": 3,
    }  # fmt: skip
    found, tokens = references_of(replace(run, config=config))
    assert tokens == 8 * 12 * 32 and found["bigram"] < found["unigram"]
    assert references_of(replace(run, config=config | {"data.path": "elsewhere"})) == (found, tokens)  # as packed
    assert references_of(replace(run, config=config | {"data.digest": "another"})) == ({}, 0)
    of_few = references_of(replace(run, config=config | {"data.val_sequences": 4}))
    assert of_few != (found, tokens)  # on the windows of the last validation
    last = {"data.val_sequences": 100, "data.final_val_sequences": 4}
    assert references_of(replace(run, config=config | last)) == of_few


def test_without_its_tokens_a_report_says_so(tmp_path):
    said = str(standing(load_sweep_results(write_sweep(tmp_path, {"vanilla": {0: 3.0}}))))
    assert said.startswith("What the models can do") and "not on this machine" in said


@pytest.mark.parametrize(("loss", "mechanics"), [(4.7, True), (4.4, False)])
def test_a_study_of_routing_says_what_its_models_have_not_learnt(loss, mechanics, tmp_path):
    found = Findings(standing=(Standing({"moepp": loss}, REFERENCES, 184_320, {}),))
    report = write_report(FIG6, found, tmp_path, MADE)[0].read_text()
    assert ("mechanics only" in report.splitlines()[0]) == mechanics
    assert report.splitlines()[2].startswith(f"What the models can do: they end at a validation loss of {loss:.3f}")
