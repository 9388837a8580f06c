import csv

import pytest
import torch

from moepp.benchmarks import choices
from moepp.benchmarks.choices import CHOICES, ChoicesBenchmark, ChoiceSide
from moepp.benchmarks.commands import at_scale
from moepp.benchmarks.folder import run_benchmark
from moepp.models import cross_entropy

SIZE = ["data.val_sequences=4"]


def weights_after(choice, chosen, steps=2):
    """Of a model that makes the choice, or does not."""
    config = ChoicesBenchmark(sizes=["smoke"], overrides=SIZE).config("smoke")
    side = ChoiceSide(chosen, config, torch.device("cpu"), seed=0)
    subjects, build = [], ChoiceSide.subject
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChoiceSide, "subject", lambda self: subjects.append(build(self)) or subjects[-1])
        call = CHOICES[choice][0](side)
    for _ in range(steps):
        call()
    return dict(subjects[0].model.named_parameters())


@pytest.mark.parametrize("choice", [name for name in CHOICES if name != "compiled"])
def test_a_choice_changes_the_time_of_a_step_and_not_what_it_learns(choice):
    ours, plain = weights_after(choice, True), weights_after(choice, False)
    assert all(torch.allclose(ours[name], plain[name], atol=2e-5) for name in plain)


def test_each_side_does_what_it_is_called_after(monkeypatch):
    asked = []
    counted = cross_entropy.chunk_count
    monkeypatch.setattr(cross_entropy, "chunk_count", lambda *args: asked.append(counted(*args)) or asked[-1])
    for chosen in (True, False):
        weights_after("loss in chunks", chosen, steps=1)
    assert asked == [4, 1] and cross_entropy.WHOLE == 2**27
    config = ChoicesBenchmark(sizes=["smoke"], overrides=SIZE).config("smoke")
    built = []
    monkeypatch.setattr(ChoiceSide, "steps", lambda self, subject, draw: built.append(subject.optimizer))
    for chosen in (True, False):
        CHOICES["fused optimizer"][0](ChoiceSide(chosen, config, torch.device("cpu"), 0))
    assert [(each.defaults["fused"], each.defaults["foreach"]) for each in built] == [(True, None), (None, True)]
    assert [[g["weight_decay"] for g in each.param_groups] for each in built] == [[0.1, 0.0]] * 2


def test_one_side_compiles_and_one_has_a_loader_process(monkeypatch):
    config = ChoicesBenchmark(sizes=["smoke"], overrides=SIZE).config("smoke")
    asked, workers = [], []
    monkeypatch.setattr(choices, "decoder", lambda config, device: asked.append(config.trainer.compile))
    monkeypatch.setattr("torch.utils.data.DataLoader", lambda *_, num_workers, **__: workers.append(num_workers) or [])
    for chosen in (True, False):
        side = ChoiceSide(chosen, config, torch.device("cpu"), 0)
        CHOICES["compiled"][0](side)
        CHOICES["a loader process"][0](side)
    assert asked == [True, False, False, False] and workers == [1, 0]


def test_every_choice_is_in_the_report(tmp_path):
    run_benchmark(at_scale("choices", "smoke", {}), tmp_path)
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["choice"] for row in rows] == list(CHOICES)[1:]
    for row in rows:
        assert not row["failure"] and float(row["gain"]) == pytest.approx(
            float(row["without_ms"]) / float(row["with_ms"]), rel=1e-4
        )
    assert "a loader process" in (tmp_path / "report.md").read_text()
