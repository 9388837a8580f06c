"""Runs with trainer.compile, cuda_graphs and deterministic. On CPUs traced and differentiated as for inductor, whose
own work would take minutes: `aot_eager`.
"""

import pytest
import torch
from test_run import cut_at, losses, run
from torch.torch_version import TorchVersion

from moepp.config import compose
from moepp.errors import UsageError
from moepp.training import compiled
from moepp.training.module import LanguageModel
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory
from moepp.training.weights import load_model

WHOLE = ["trainer.precision=bf16-mixed", "model.backend=grouped"]  # leaves no graph
GPU = [*WHOLE, "trainer.accelerator=gpu", "trainer.accumulate=2"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Compiles nothing from the tests before, and leaves torch as it was."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def traced(monkeypatch):
    """The graphs that were compiled."""
    graphs = []

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs, **options)

    monkeypatch.setattr(compiled, "COMPILER", backend)
    return graphs


def assert_close(found, wanted, tolerance=2e-2):
    assert [sorted(line) for line in losses(found)] == [sorted(line) for line in losses(wanted)]
    for line, reference in zip(losses(found), losses(wanted), strict=True):
        assert line == pytest.approx(reference, rel=tolerance, abs=tolerance)


def names(record):
    return list(torch.load(record.checkpoints / "final.ckpt", weights_only=True)["state_dict"])


RECOMPUTED = pytest.param(
    ["model.activation_checkpointing=true", "trainer.accumulate=2"],
    marks=pytest.mark.skipif(torch.__version__ < TorchVersion("2.13"), reason="refused with this torch"),
)


@pytest.mark.parametrize("more", [[], RECOMPUTED], ids=str)
def test_a_compiled_run_is_one_graph_with_the_names_and_the_losses_of_any_other(overrides, traced, more):
    plain = run(overrides, *WHOLE, *more, "name=plain")
    assert not traced
    found = run(overrides, *WHOLE, *more, "trainer.compile=true", "trainer.expert_timing=true")
    assert len(traced) == 1  # for all steps; validations and the timing run as ever
    assert found.path.name == plain.path.name  # the same identity
    assert names(found) == names(plain)
    assert found.final()["expert_forward_ms"] > 0
    assert [line["train/loss"] for line in found.metrics() if "train/loss" in line] == pytest.approx(
        [line["train/loss"] for line in plain.metrics() if "train/loss" in line], rel=5e-3
    )
    assert found.final()["val_loss"] == pytest.approx(plain.final()["val_loss"], rel=5e-3)


def test_a_checkpoint_of_an_uncompiled_run_is_continued_by_a_compiled_one(overrides, traced, monkeypatch):
    more = [*WHOLE, "model.layers=1"]
    whole = run(overrides, *more, "name=whole")
    config = freeze(compose(RunConfig, [*overrides, *more, "name=cut"]))
    record = cut_at(6, config, monkeypatch)
    assert not traced
    config.trainer.compile = True
    assert run_directory(config) == record.path
    train(config, record.path)
    assert len(traced) == 1
    assert_close(record, whole)


@pytest.mark.parametrize("method", ["loss_free", "remoe"])
def test_control_follows_the_steps_of_a_compiled_run(overrides, traced, method):
    arms = [f"model={method}", "model.layers=1", "trainer.accumulate=2"]
    plain, found = (run(overrides, *arms, f"name={c}", f"trainer.compile={c}") for c in ("false", "true"))
    assert traced
    assert_close(found, plain, 1e-3)
    ours, theirs = (load_model(record.path)[0].state_dict() for record in (found, plain))
    control = [name for name in theirs if ".control." in name]
    assert control and all(torch.equal(ours[name], theirs[name]) for name in control)


def test_losses_and_gradients_are_not_where_the_next_replay_of_a_cuda_graph_writes(overrides, monkeypatch):
    """Stands for the graph: every step puts its balance loss into the same tensor, as a replay does."""
    config = compose(RunConfig, [*overrides, "trainer.compile=true", "trainer.cuda_graphs=true"])
    static, calls = torch.zeros(()), []

    def replay(model, tokens):
        cross_entropy, balance, output = compiled.training_losses(model, tokens)
        calls.append(float(static.copy_(balance.detach())))
        return cross_entropy, static, output

    monkeypatch.setattr("moepp.training.module.losses_of", lambda config: replay)
    module = LanguageModel.of_run(config, 0)
    monkeypatch.setattr(LanguageModel, "global_step", 0)
    module.on_train_start()
    buffers = [p.grad.data_ptr() for p in module.parameters()]
    optimizer = module.configure_optimizers()["optimizer"]
    generator = torch.Generator().manual_seed(0)
    kept = []
    for _ in range(2):
        module.training_step(torch.randint(0, 64, (2, 9), generator=generator)).backward()
        kept.append(module.train_losses)
        assert all(p.grad.any() for p in module.model.moe_layers()[0].router.parameters())
        module.optimizer_zero_grad(0, 0, optimizer)
    assert [p.grad.data_ptr() for p in module.parameters()] == buffers
    assert not any(p.grad.any() for p in module.parameters())
    assert [float(losses["train/balance_loss"]) for losses in kept] == calls and calls[0] != calls[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["trainer.cuda_graphs=true"], r"cuda_graphs=true records what torch\.compile made: set trainer\.compile=true"),
        (
            ["trainer.compile=true", "trainer.cuda_graphs=true", "strategy=ddp"],
            r"trainer\.cuda_graphs=true records one device, and strategy=ddp",
        ),
        (["trainer.compile=true", "strategy=expert_parallel"], r"strategy=expert_parallel would compile anew"),
        (["trainer.compile=true", "model.backend=grouped"], r"backend=grouped in bfloat16 only"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_with_the_config(overrides, more, message):
    with pytest.raises(UsageError, match=message):
        compose(RunConfig, [*overrides, *more])


def test_cuda_graphs_without_a_gpu_are_refused(overrides):
    with pytest.raises(UsageError, match=r"^trainer\.cuda_graphs=true needs a GPU"):
        run(overrides, "trainer.compile=true", "trainer.cuda_graphs=true")


@pytest.mark.parametrize(("named", "wanted"), [("", r"g\+\+ or clang\+\+ or c\+\+"), ("nvc++", r"nvc\+\+")])
def test_a_missing_compiler_is_named(overrides, monkeypatch, tmp_path, named, wanted):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", named)
    with pytest.raises(UsageError, match=rf"needs a C\+\+ compiler, and {wanted} is not on the PATH"):
        run(overrides, "trainer.compile=true")


def test_on_a_gpu_triton_and_a_c_compiler_are_asked_for(monkeypatch, tmp_path):
    config = RunConfig()
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package triton"):
        compiled.refuse_what_cannot_be_compiled(config.model, on_gpu=True)
    monkeypatch.setattr(compiled, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UsageError, match="needs a C compiler, and gcc or clang or cc is not"):
        compiled.refuse_what_cannot_be_compiled(config.model, on_gpu=True)


def test_checkpoints_of_activations_are_not_compiled_by_a_torch_that_loses_their_statistics(overrides, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    with pytest.raises(UsageError, match=r"needs torch 2\.13, and this is 2\.11\.0, which loses"):
        run(overrides, "trainer.compile=true", "model.activation_checkpointing=true")


def test_deterministic_runs_ask_torch_for_it_and_are_the_same_run(overrides, monkeypatch):
    seen = []
    step = LanguageModel.training_step

    def watch(self, tokens):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(self, tokens)

    monkeypatch.setattr(LanguageModel, "training_step", watch)
    found = run(overrides, "trainer.deterministic=true")
    assert seen == [True] * 12
    plain = run(overrides, "name=plain")
    assert seen[12:] == [False] * 12
    assert found.path.name == plain.path.name and losses(found) == losses(plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", ["false", "true"], ids=["compiled", "cuda_graphs"])
def test_on_a_gpu_a_compiled_run_has_the_losses_of_any_other(overrides, graphs):
    more = [*GPU, "trainer.steps=20"]
    plain = run(overrides, *more, "name=plain")
    found = run(overrides, *more, "name=found", "trainer.compile=true", f"trainer.cuda_graphs={graphs}")
    assert names(found) == names(plain)
    for name in ("train/loss", "val/loss"):
        ours, theirs = ([line[name] for line in record.metrics() if name in line] for record in (found, plain))
        assert ours == pytest.approx(theirs, rel=2e-2) and ours[-1] < ours[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["grouped", "triton"])
@pytest.mark.parametrize("step", [3, 6])
def test_on_a_gpu_a_run_that_is_killed_continues_to_the_same_bits(overrides, monkeypatch, backend, step):
    more = [*GPU, f"model.backend={backend}", "trainer.deterministic=true"]
    whole = run(overrides, *more, "name=whole")
    config = freeze(compose(RunConfig, [*overrides, *more, "name=cut"]))
    record = cut_at(step, config, monkeypatch)
    train(config, record.path)
    assert losses(record) == losses(whole)
