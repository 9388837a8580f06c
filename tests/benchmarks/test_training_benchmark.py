import csv
from importlib.util import find_spec

import pytest
import torch

from moepp.benchmarks import race, training
from moepp.benchmarks.commands import at_scale
from moepp.benchmarks.folder import run_benchmark
from moepp.benchmarks.memory import counts_pages
from moepp.benchmarks.subjects import decoder, mixtral, qwen3_moe
from moepp.benchmarks.training import MIXTRAL, QWEN, RELEASED, Entrant, TrainingBenchmark, TrainingGroup
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
        config = Entrant("smoke", row["model"], False).config()
        flops = 3 * sum(forward_flops(config.model, config.data.seq_len, per_token).values())
        assert float(row["mfu"]) == pytest.approx(flops * speed / 1e12, rel=1e-4)
        assert float(row["over_vanilla"]) == pytest.approx(speed / float(vanilla["tokens_per_s"]), rel=1e-4)
    assert float(moepp["ffn_per_token"]) < float(vanilla["ffn_per_token"]) <= 2
    assert (tmp_path / "report.md").exists() and (tmp_path / "provenance.json").exists()


def test_a_step_updates_the_weights():
    config = Entrant("smoke", "moepp", False).config()
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
    config = Entrant("smoke", "vanilla", False).config()
    config.model.capacity_factor = 0.5
    tokens = torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(0))
    assert decoder(config, CPU).ffn_per_token(tokens) == pytest.approx(1.0)  # half of top-2


@pytest.mark.parametrize("arm", ["moepp", "vanilla"])
def test_the_released_layer_in_our_decoder_computes_the_same_with_weights_of_each_expert(arm):
    tokens = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(0))
    group = Entrant("smoke", f"{arm}{RELEASED}", False)
    ours, theirs = decoder(group.config(), CPU), group.subject(group.config(), CPU)
    torch.testing.assert_close(theirs.losses(tokens), ours.losses(tokens), rtol=0, atol=1e-5)
    sizes = [sum(weight.numel() for weight in subject.model.parameters()) for subject in (ours, theirs)]
    assert sizes[0] == sizes[1] and theirs.ffn_per_token(tokens) == ours.ffn_per_token(tokens)
    theirs.step(tokens, 1.0)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch):
    tried = []

    def begin(self, entrant, tokens, device):
        tried.append(len(tokens))
        if len(tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.begun(entrant, tokens, device)

    monkeypatch.setattr(TrainingBenchmark, "begun", TrainingBenchmark._begin, raising=False)
    monkeypatch.setattr(TrainingBenchmark, "_begin", begin)
    group = TrainingGroup((Entrant("smoke", "moepp", False, ("data.batch_size=16",)),))
    [row] = TrainingBenchmark(repeats=1, warmup=0).measure(group, [], CPU, None)
    assert tried == [16, 8, 4] and (row["batch"], row["failure"]) == (4 * 32, None)


def test_a_model_of_which_no_sequence_fits_is_a_cell(monkeypatch):
    def begin(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingBenchmark, "_begin", begin)
    [row] = TrainingBenchmark().measure(TrainingGroup((Entrant("smoke", "moepp", True),)), [], CPU, None)
    assert row == {"size": "smoke", "model": "moepp", "compiled": "yes", "failure": "out of memory"}


def test_models_of_a_size_are_timed_in_turn_with_one_routing_and_one_that_fails_costs_itself_alone(monkeypatch):
    order, peaks = [], {}

    def begin(self, entrant, tokens, device):
        if entrant.model == MIXTRAL:
            raise ValueError("no such package")
        begun = self.begun(entrant, tokens, device)
        fresh = entrant.subject(entrant.config(), device)
        assert all(map(torch.equal, begun.subject.model.parameters(), fresh.model.parameters()))  # it was not trained
        peaks[entrant.model] = begun.peak
        step = begun.subject.step
        begun.subject.step = lambda *given: order.append(entrant.model) or step(*given)
        return begun

    monkeypatch.setattr(TrainingBenchmark, "begun", TrainingBenchmark._begin, raising=False)
    monkeypatch.setattr(TrainingBenchmark, "_begin", begin)
    models = [(name, False) for name in ("moepp", f"moepp{RELEASED}", MIXTRAL)]
    benchmark = TrainingBenchmark(sizes=["smoke"], models=models, together=True, repeats=3, warmup=1)
    [group] = benchmark.groups()
    ours, released, mixtral_row = benchmark.measure(group, [], CPU, None)
    assert [set(order[at : at + 2]) for at in (0, 2, 4)] == 3 * [{"moepp", f"moepp{RELEASED}"}]
    assert ours["ffn_per_token"] == released["ffn_per_token"] < 2
    assert mixtral_row["failure"] == "ValueError: no such package" and "step_ms" not in mixtral_row
    assert all(row["step_ms"] > 0 and row["failure"] is None for row in (ours, released))
    assert ours["gib"] == (peaks["moepp"] / 2**30 if counts_pages() else None)


def test_the_gpu_scale_has_every_model_with_and_without_compilation():
    groups = at_scale("training", "gpu", {}).groups()
    alone = [entrant for group in groups for entrant in group.entrants]
    assert len(alone) == len(groups) and {(e.size, e.model, e.compiled) for e in alone} == {
        (size, model, compiled)
        for size in ("small", "0.6b")
        for model in ("moepp", "vanilla", MIXTRAL)
        for compiled in (True, False)
    }
    assert [entrant.compiled for entrant in alone] == [False] * 6 + [True] * 6  # compilation takes a window's minute
    assert [entrant.size for entrant in alone] == 2 * (["small"] * 3 + ["0.6b"] * 3)
    assert alone[6].config().trainer.compile and alone[3].config().data.seq_len == 2048


@needs_transformers
@pytest.mark.parametrize("size", ["smoke", "small", "0.6b"])
def test_mixtral_has_the_parameters_of_vanilla_moe(size):
    config = Entrant(size, MIXTRAL, False).config()
    model = mixtral(config, torch.device("meta")).model
    assert sum(weight.numel() for weight in model.parameters()) == sum(parameters(config.model).values())


@needs_transformers
def test_qwen3_moe_has_them_too_but_for_the_norms_of_queries_and_keys():
    config = Entrant("smoke", QWEN, False).config()
    model = qwen3_moe(config, torch.device("meta")).model
    norms = 2 * config.model.layers * config.model.head_dim
    assert sum(weight.numel() for weight in model.parameters()) - norms == sum(parameters(config.model).values())


@needs_transformers
def test_mixtral_learns():
    subject = mixtral(Entrant("smoke", MIXTRAL, False).config(), CPU)
    tokens = torch.randint(512, (8, 33), generator=torch.Generator().manual_seed(0))
    before = subject.step(tokens, 1.0).item()
    for _ in range(10):
        after = subject.step(tokens, 1.0).item()
    assert after < before - 0.5
    whole, cross_entropy = subject.losses(tokens)
    assert 0 < (whole - cross_entropy).item() < 1  # the balance loss
