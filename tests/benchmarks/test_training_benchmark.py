import csv
from importlib.util import find_spec

import pytest
import torch

from moepp.benchmarks import race, training
from moepp.benchmarks.commands import at_scale
from moepp.benchmarks.folder import run_benchmark
from moepp.benchmarks.subjects import decoder, mixtral, qwen3_moe
from moepp.benchmarks.training import MIXTRAL, QWEN, RELEASED, TrainingBenchmark, TrainingGroup
from moepp.config import compose
from moepp.models.budget import forward_flops, parameters
from moepp.training.settings import RunConfig

CPU = torch.device("cpu")
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs the package transformers")


def table_of(out):
    with open(out / "table.csv") as file:
        return list(csv.DictReader(file))


def test_the_smoke_scale_times_steps_and_sets_them_beside_vanilla_moe(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "peak_flops", lambda device: 1e12)
    run_benchmark(at_scale("training", "smoke", {}), tmp_path)
    mixtral_row, moepp, vanilla = table_of(tmp_path)
    assert [row["model"] for row in (mixtral_row, moepp, vanilla)] == [MIXTRAL, "moepp", "vanilla"]
    assert (mixtral_row["failure"] == "") == (find_spec("transformers") is not None)
    assert moepp["batch"] == vanilla["batch"] == "256"
    for row in (moepp, vanilla):
        speed, per_token = float(row["tokens_per_s"]), float(row["ffn_per_token"])
        assert speed == pytest.approx(256_000 / float(row["step_ms"]), rel=1e-4)
        config = TrainingGroup("smoke", row["model"], False).config()
        flops = 3 * sum(forward_flops(config.model, config.data.seq_len, per_token).values())
        assert float(row["mfu"]) == pytest.approx(flops * speed / 1e12, rel=1e-4)
        assert float(row["over_vanilla"]) == pytest.approx(speed / float(vanilla["tokens_per_s"]), rel=1e-4)
    assert float(moepp["ffn_per_token"]) < float(vanilla["ffn_per_token"]) <= 2
    assert (tmp_path / "report.md").exists() and (tmp_path / "provenance.json").exists()


def test_a_step_updates_the_weights():
    config = TrainingGroup("smoke", "moepp", False).config()
    subject = decoder(config, CPU)
    before = [weight.detach().clone() for weight in subject.model.parameters()]
    subject.step(torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(0)), 1.0)
    changed = [not torch.equal(*pair) for pair in zip(before, subject.model.parameters(), strict=True)]
    assert all(changed)


def test_a_race_ends_with_the_step_whose_mean_loss_is_low_enough(corpus_config):
    losses, seen, rates = iter([5.0, 3.0, 2.0, 1.0, 0.5]), [], []

    class Falling:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

        def step(self, tokens, grad_clip):
            seen.append(tokens)
            rates.append(self.optimizer.param_groups[0]["lr"])
            return torch.tensor(next(losses))

    corpus_config.optim.warmup_steps, corpus_config.trainer.steps = 4, 5
    assert race.steps_to_loss(lambda config: Falling(), corpus_config, 2.0, seed=1) == 4  # 3, 2 and 1
    assert rates == [0.25, 0.5, 0.75, 1.0] and not torch.equal(seen[0], seen[1])
    losses = iter([5.0] * 5)
    assert race.steps_to_loss(lambda config: Falling(), corpus_config, 2.0, seed=1) is None


@pytest.fixture
def corpus_config(monkeypatch, tmp_path):
    monkeypatch.setattr(race, "SMOOTHED", 3)
    for file in range(20):
        lines = (f"{i} and {i * i}, so to speak. " for i in range(200 * file, 200 * file + 200))
        (tmp_path / f"{file}.txt").write_text("".join(lines))
    words = ["size=smoke", "data=text", f"data.path={tmp_path}/*.txt", f"data.cache={tmp_path}/cache"]
    return compose(RunConfig, [*words, "tracking=jsonl"])


def test_ffn_experts_per_token_are_those_that_were_not_dropped():
    config = TrainingGroup("smoke", "vanilla", False).config()
    config.model.capacity_factor = 0.5
    tokens = torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(0))
    assert decoder(config, CPU).ffn_per_token(tokens) == pytest.approx(1.0)  # half of top-2


@pytest.mark.parametrize("arm", ["moepp", "vanilla"])
def test_the_released_layer_in_our_decoder_computes_the_same_with_weights_of_each_expert(arm):
    tokens = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(0))
    group = TrainingGroup("smoke", f"{arm}{RELEASED}", False)
    ours, theirs = decoder(group.config(), CPU), group.subject(group.config(), CPU)
    torch.testing.assert_close(theirs.losses(tokens), ours.losses(tokens), rtol=0, atol=1e-5)
    sizes = [sum(weight.numel() for weight in subject.model.parameters()) for subject in (ours, theirs)]
    assert sizes[0] == sizes[1] and theirs.ffn_per_token(tokens) == ours.ffn_per_token(tokens)
    theirs.step(tokens, 1.0)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch):
    tried = []

    def steps(self, config, group, sequences, device):
        tried.append(sequences)
        if sequences > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"batch": sequences * config.data.seq_len}

    monkeypatch.setattr(TrainingBenchmark, "_steps", steps)
    [row] = TrainingBenchmark().measure(TrainingGroup("small", "moepp", True), [], CPU, None)
    assert tried == [64, 32, 16] and (row["batch"], row["failure"]) == (16 * 1024, None)


def test_a_model_of_which_no_sequence_fits_is_a_cell(monkeypatch):
    def steps(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingBenchmark, "_steps", steps)
    [row] = TrainingBenchmark().measure(TrainingGroup("0.6b", "moepp", True), [], CPU, None)
    assert row == {"size": "0.6b", "model": "moepp", "compiled": "yes", "failure": "out of memory"}


def test_the_gpu_scale_has_every_model_with_and_without_compilation():
    groups = at_scale("training", "gpu", {}).groups()
    assert {(g.size, g.model, g.compiled) for g in groups} == {
        (size, model, compiled)
        for size in ("small", "0.6b")
        for model in ("moepp", "vanilla", MIXTRAL)
        for compiled in (True, False)
    }
    assert [group.compiled for group in groups] == [False] * 6 + [True] * 6  # compilation takes a window's minute
    assert [group.size for group in groups] == 2 * (["small"] * 3 + ["0.6b"] * 3)
    assert groups[6].config().trainer.compile and groups[3].config().data.seq_len == 2048


@needs_transformers
@pytest.mark.parametrize("size", ["smoke", "small", "0.6b"])
def test_mixtral_has_the_parameters_of_vanilla_moe(size):
    config = TrainingGroup(size, MIXTRAL, False).config()
    model = mixtral(config, torch.device("meta")).model
    assert sum(weight.numel() for weight in model.parameters()) == sum(parameters(config.model).values())


@needs_transformers
def test_qwen3_moe_has_them_too_but_for_the_norms_of_queries_and_keys():
    config = TrainingGroup("smoke", QWEN, False).config()
    model = qwen3_moe(config, torch.device("meta")).model
    norms = 2 * config.model.layers * config.model.head_dim
    assert sum(weight.numel() for weight in model.parameters()) - norms == sum(parameters(config.model).values())


@needs_transformers
def test_mixtral_learns():
    subject = mixtral(TrainingGroup("smoke", MIXTRAL, False).config(), CPU)
    tokens = torch.randint(512, (8, 33), generator=torch.Generator().manual_seed(0))
    before = subject.step(tokens, 1.0).item()
    for _ in range(10):
        after = subject.step(tokens, 1.0).item()
    assert after < before - 0.5
    whole, cross_entropy = subject.losses(tokens)
    assert 0 < (whole - cross_entropy).item() < 1  # the balance loss
