import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moepp.config import compose
from moepp.data.token_files import TokenFiles
from moepp.errors import UsageError
from moepp.training.cloze import Questions, questions, score
from moepp.training.initial import FINAL_WEIGHTS
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

CPU = torch.device("cpu")


def test_scores_of_known_likelihoods_by_hand():
    """Token t has probability 2^-(t+1) whatever stands before it, so the answer of smallest sum is the likeliest."""
    logits = -torch.arange(1, 9) * math.log(2)
    choices = [[[5, 0, 1], [5, 2, 2], [5, 3, 3], [5, 4, 4]], [[5, 3, 1], [5, 2, 2], [5, 0, 0], [5, 4, 4]]]
    asked = Questions(torch.tensor(choices), torch.tensor([2, 4]), answer=2)
    found = score(lambda ids: logits.expand(*ids.shape, 8), asked, CPU)
    normaliser = math.log2(sum(2.0**-t for t in range(1, 9)))
    assert found["accuracy"] == 0.5
    assert found["bits_per_byte"] == pytest.approx((1 + 2 + 4 + 2 + 4 * normaliser) / 6)


def test_questions_come_from_the_held_out_text(token_folder):
    tokens = TokenFiles.open(token_folder)
    asked = questions(tokens, seq_len=32, count=32)
    assert asked.ids_QCL.shape == (32, 4, 32) and asked.answer == 8
    text = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens.val), 32)
    for ids_CL in asked.ids_QCL.numpy():
        assert (text == ids_CL[0]).all(1).any()
        assert (ids_CL[:, :-8] == ids_CL[0, :-8]).all()
    answers = asked.ids_QCL[:, :, -8:]
    own = {tuple(answer.tolist()) for answer in answers[:, 0]}
    assert all(tuple(answer.tolist()) in own for answer in answers[:, 1:].flatten(0, 1))
    assert (asked.bytes_Q == (answers[:, 0] != 0).sum(1)).all()  # id 0 stands for no byte


def test_scoring_changes_nothing_but_adds_its_metrics(overrides, tmp_path):
    """Validations at steps 3, 6, 9, 12; two points are the second and the fourth."""
    settings = [*overrides, "trainer.val_every=3"]
    plain = freeze(compose(RunConfig, [*settings, f"runs={tmp_path / 'plain'}"]))
    scored = freeze(compose(RunConfig, [*settings, f"runs={tmp_path / 'scored'}", "cloze.points=2"]))
    assert run_directory(plain).name == run_directory(scored).name  # not part of a run's identity
    records = [train(config, run_directory(config)) for config in (plain, scored)]
    losses = [
        [(line["step"], value) for line in record.metrics() for key, value in line.items() if key in KEPT]
        for record in records
    ]
    assert losses[0] == losses[1]
    weights = [torch.load(record.checkpoints / FINAL_WEIGHTS)["state_dict"] for record in records]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    found = [line for line in records[1].metrics() if "val/cloze_accuracy" in line]
    assert [line["step"] for line in found] == [6, 12]
    assert found[1]["val/cloze_bits_per_byte"] < found[0]["val/cloze_bits_per_byte"]
    assert not any("val/cloze_accuracy" in line for line in records[0].metrics())
    final, seconds = records[1].final(), sum(line["perf/cloze_seconds"] for line in found)
    assert final["cloze_share"] == pytest.approx(seconds / (12 * final["step_time_ms"] / 1000)) and seconds > 0
    assert "cloze_share" not in records[0].final()


def test_a_text_with_places_for_fewer_questions_than_choices_is_refused(token_folder):
    tokens = TokenFiles.open(token_folder)

    def made(held_out):
        text = SimpleNamespace(val=tokens.val[:held_out], val_lengths=tokens.val_lengths)
        return questions(text, seq_len=32, count=32).ids_QCL

    choices = made(4 * 32)
    assert len(choices) == 4 and all(len({tuple(ids.tolist()) for ids in ids_CL}) == 4 for ids_CL in choices)
    with pytest.raises(UsageError, match=r"^127 held-out tokens are too few for 4 cloze questions of 32, .*points=0$"):
        made(4 * 32 - 1)


KEPT = ("train/loss", "train/grad_norm", "val/loss", "final/val_loss", "final/router_entropy")


def test_too_few_questions_are_refused():
    with pytest.raises(UsageError, match=r"cloze\.questions=\d must be at least 4"):
        compose(RunConfig, ["cloze.questions=3"])
