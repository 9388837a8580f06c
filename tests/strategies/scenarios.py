"""Training runs that any number of devices must repeat, and the processes that make them."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from moepp.config import compose
from moepp.data.batches import TokenDataModule
from moepp.layers.moe import MoELayer
from moepp.models import cross_entropy
from moepp.strategies.ddp import ExpertParallelStrategy
from moepp.strategies.registry import make_strategy
from moepp.strategies.sharding import expert_banks, local
from moepp.training.cloze import ClozeScorer
from moepp.training.module import LanguageModel
from moepp.training.settings import RunConfig

STEPS = 4
CLIP = 0.3  # below every gradient norm of these runs
MODELS = {
    "moepp": [],
    "dropless": ["model.capacity_factor=null"],
    "tight": ["model.capacity_factor=0.6"],
    "vanilla": ["model=vanilla", "model.capacity_factor=null"],
    "vanilla_tight": ["model=vanilla", "model.capacity_factor=0.6"],
    "loss_free": ["model=loss_free"],
    "remoe": ["model=remoe"],
    "few_experts": ["model.experts.ffn=2"],
    "recomputed": ["model.activation_checkpointing=true"],
    "shared": ["model.experts.shared=1"],
    "sequence": ["model.capacity_factor=0.7", "model.capacity_over=sequence", "model.balance.over=sequence"],
}


@dataclass
class Scenario:
    """One run of STEPS optimizer steps. `resume` is the run, as `<devices>/<name>`, whose middle it continues."""

    model: str = "moepp"
    strategy: str = "single"
    expert_parallel_size: int = 0
    accumulate: int = 1
    precision: str = "32-true"
    optimizer: str = "sgd"  # or adamw, the product's own
    banned: dict[int, list[int]] = field(default_factory=dict)  # by layer: experts that no token chooses
    resume: str = ""
    chunked: bool = False  # the loss is computed by chunks of logits
    shard_size: int = 0
    in_parts: bool = False  # checkpoints are
    wrong_scale: bool = False
    traced: bool = False  # the last step is

    @property
    def name(self) -> str:
        parts = [self.model, self.strategy, self.expert_parallel_size or "", self.precision]
        parts += [self.optimizer if self.optimizer != "sgd" else ""]
        parts += [f"shards{self.shard_size}" if self.shard_size else ""]
        parts += [f"accumulate{self.accumulate}" if self.accumulate > 1 else ""]
        parts += [f"without{layer}:{len(experts)}" for layer, experts in self.banned.items()]
        parts += [f"after-{self.resume.replace('/', '-')}" if self.resume else ""]
        parts += [word for word in ("chunked", "in_parts", "wrong_scale", "traced") if getattr(self, word)]
        return "_".join(str(part) for part in parts if part)

    @property
    def on_meta(self) -> bool:
        """Whether the model is built without weights, as a run's is; the others are whole on every device at first."""
        return self.strategy in STRATEGIES[1:] and self.optimizer == "sgd"

    @property
    def reference(self) -> "Scenario":
        """The same on one device, from the first step on, with all logits at once."""
        devices = {"strategy": "single", "expert_parallel_size": 0, "shard_size": 0}
        return replace(self, **devices, resume="", chunked=False, in_parts=False, wrong_scale=False, traced=False)


STRATEGIES = ("ddp", "fsdp", "expert_parallel", "expert_parallel_fsdp")
SHARDED_EXPERTS = STRATEGIES[2:]
NO_TOKENS = {0: [2, 3], 1: [0, 1, 2, 3]}  # for the second of two devices in one layer, for any FFN expert in the other


def after(devices: str, begun: Scenario, strategy: str, expert_parallel_size: int = 0) -> Scenario:
    """`begun`, continued from its middle under another strategy."""
    resume = f"{devices}/{begun.name}"
    return replace(begun, strategy=strategy, expert_parallel_size=expert_parallel_size, resume=resume)


TWO_DEVICES = [
    *(Scenario(strategy=strategy) for strategy in STRATEGIES),
    *(Scenario("tight", strategy) for strategy in ("ddp", "expert_parallel", "expert_parallel_fsdp")),
    *(Scenario(model, "expert_parallel") for model in ("loss_free", "remoe")),
    *(Scenario(model, strategy) for model in ("dropless", "vanilla") for strategy in STRATEGIES),
    *(Scenario("vanilla_tight", strategy) for strategy in ("fsdp", "expert_parallel")),
    *(Scenario(strategy=strategy, accumulate=2) for strategy in STRATEGIES),
    *(Scenario(strategy=strategy, banned=NO_TOKENS) for strategy in SHARDED_EXPERTS),
    *(Scenario(strategy=strategy, precision="bf16-mixed") for strategy in STRATEGIES),
    *(Scenario(strategy=strategy, chunked=True) for strategy in ("ddp", "fsdp")),
    Scenario(strategy="expert_parallel", wrong_scale=True),
    *(Scenario(strategy=strategy, optimizer="adamw", in_parts=True) for strategy in ("fsdp", "expert_parallel")),
    after("two", Scenario(strategy="fsdp", optimizer="adamw", in_parts=True), "expert_parallel"),
    *(Scenario("recomputed", strategy) for strategy in SHARDED_EXPERTS),
    *(Scenario("sequence", strategy) for strategy in ("ddp", "expert_parallel")),
    *(Scenario(strategy=strategy, optimizer="adamw") for strategy in STRATEGIES[1:]),
    # What every strategy saves is what one device saves (a test of its own), so one checkpoint each is enough to load.
    after("one", Scenario(), "ddp"),
    *(after("two", Scenario(strategy=first), then) for first, then in pairwise(STRATEGIES)),
    after("one", Scenario(optimizer="adamw"), "fsdp"),
    *(after("two", Scenario(strategy=s, optimizer="adamw"), then) for s, then in pairwise(STRATEGIES[1:])),
]
# Continued as they were begun: on the same devices every digit is that of the run that was not interrupted.
RESUMED = [
    Scenario(strategy="ddp"),
    Scenario(strategy="fsdp", optimizer="adamw", in_parts=True),
    Scenario(strategy="expert_parallel", expert_parallel_size=2, in_parts=True),
]
FOUR_DEVICES = [
    *RESUMED,
    *(after("four", begun, begun.strategy, begun.expert_parallel_size) for begun in RESUMED),
    Scenario("shared", "expert_parallel", 2, traced=True),
    *(Scenario(strategy=strategy) for strategy in STRATEGIES[1:]),
    *(Scenario(model, "expert_parallel") for model in ("dropless", "vanilla")),
    Scenario("few_experts", "fsdp"),
    Scenario("few_experts", "expert_parallel_fsdp", 2),
    *(Scenario(strategy=strategy, expert_parallel_size=2) for strategy in SHARDED_EXPERTS),
    Scenario("vanilla_tight", "expert_parallel", 2),
    Scenario(strategy="fsdp", shard_size=2),
    Scenario("loss_free", "expert_parallel_fsdp", 2, in_parts=True),
    after("four", Scenario("loss_free", "expert_parallel_fsdp", 2, in_parts=True), "fsdp"),
    Scenario(strategy="expert_parallel", expert_parallel_size=2, accumulate=2),
    *(after("two", Scenario(strategy=strategy), strategy, 2) for strategy in SHARDED_EXPERTS),
]
ONE_DEVICE = [after("two", Scenario(strategy=STRATEGIES[-1], optimizer=o), "single") for o in ("sgd", "adamw")]


class SGDLanguageModel(LanguageModel):
    """With an optimizer that, unlike Adam, does not forgive a wrong gradient scale."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class WrongScale(ExpertParallelStrategy):
    def reduce_expert_gradients(self):
        super().reduce_expert_gradients()
        for parameter in self.sharding.experts:
            parameter.grad.mul_(self.groups.size)


WATCHED = ("losses", "norms", "routing", "validations", "communication")


class Watch(Callback):
    """Writes down the global losses, gradient norms, routing and validations, and saves in the middle."""

    def __init__(self, middle: Path):
        self.middle, self.losses, self.norms, self.routing = middle, [], [], []
        self.validations, self.communication = [], []

    def on_train_batch_end(self, trainer, module, *_):
        values = torch.stack(list(module.train_losses.values()))
        self.losses.append(trainer.strategy.reduce(values, reduce_op="mean").tolist())
        if trainer.fit_loop._should_accumulate():
            return
        self.routing.append({name: float(value) for name, value in module.train_routing.compute().items()})
        if hasattr(trainer.strategy, "metrics"):
            self.communication.append(trainer.strategy.metrics())
        if trainer.global_step == STEPS // 2:
            trainer.save_checkpoint(self.middle)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        strategy = trainer.strategy
        parameters = list(module.parameters())
        norm = getattr(strategy, "gradient_norm", lambda ps: torch.nn.utils.get_total_norm([p.grad for p in ps]))
        self.norms.append(float(norm(parameters)))

    def on_validation_epoch_end(self, trainer, module):
        routing = {name: float(value) for name, value in module.val_routing.compute().items()}
        self.validations.append(module.validation_metrics() | routing)


class Trace(Callback):
    """What begins in the last step, by name, in order: regions of layers, and what the backward pass computes."""

    def __init__(self):
        self.began: list[str] = []

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == STEPS - 1:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.start()

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == STEPS:
            self.profiler.stop()
            events = sorted(self.profiler.events(), key=lambda event: event.time_range.start)
            self.began = [event.name for event in events]


class Rows:
    """Counts the FFN rows of training whose expert lies on another device, and the bytes that cross."""

    def __init__(self, module: LanguageModel, strategy):
        self.local = self.remote = self.wire = 0
        self.strategy = strategy
        for layer in module.model.moe_layers():
            layer.expert_forward = self.counting(layer)

    def counting(self, layer: MoELayer):
        forward, experts = layer.expert_forward, layer.config.experts.ffn

        def count(x_TD, routing, *known):
            if layer.training:
                ids = routing.expert_TK[routing.expert_TK < experts]
                groups = self.strategy.groups
                away = ids // (experts // groups.size) != groups.rank
                self.remote += int(away.sum())
                self.local += int((~away).sum())
            return forward(x_TD, routing, *known)

        return count

    def __enter__(self):
        self.real = dist.all_to_all_single

        def spy(output, rows, receive, send, **options):
            if self.watching():
                here = self.strategy.groups.rank
                self.wire += (sum(send) - send[here]) * rows.shape[1] * rows.element_size()
            return self.real(output, rows, receive, send, **options)

        dist.all_to_all_single = spy
        return self

    def watching(self) -> bool:
        return self.strategy.lightning_module.trainer.training

    def __exit__(self, *_):
        dist.all_to_all_single = self.real


def ban(module: LanguageModel, banned: dict[int, list[int]]) -> None:
    for index, experts in banned.items():
        layer = module.model.moe_layers()[int(index)]

        def route(logits_TN, layer=layer, experts=experts):
            mask = torch.zeros(logits_TN.shape[1]).index_fill(0, torch.tensor(experts), -1e4)
            return MoELayer.route(layer, logits_TN + mask)

        layer.route = route


def run_scenario(
    scenario: Scenario, tokens: str, folder: Path, accelerator: str = "cpu", *more: str, first: Callable | None = None
) -> dict:
    """Trains, saves `<name>.middle.ckpt` and `<name>.ckpt` in `folder`, and returns what it saw. `first` is called with
    the trainer, the module and its data.
    """
    overrides = ["size=smoke", "tracking=jsonl", "data=tokens", f"data.path={tokens}", "model.vocab_size=64"]
    overrides += ["data.val_sequences=13"]  # which no number of devices divides
    overrides += [f"strategy={scenario.strategy}"] if scenario.on_meta else []
    config = compose(RunConfig, [*overrides, *MODELS[scenario.model], *more])
    made_by = WrongScale if scenario.wrong_scale else partial(make_strategy, scenario.strategy)
    options = {"checkpoints_in_parts": True} if scenario.in_parts else {}
    options |= {"shard_size": scenario.shard_size} if scenario.shard_size else {}
    strategy = made_by(expert_parallel_size=scenario.expert_parallel_size, timeout_s=60, **options)
    module = (SGDLanguageModel if scenario.optimizer == "sgd" else LanguageModel).of_run(config, 0)
    ban(module, scenario.banned)
    watch, trace = Watch(folder / f"{scenario.name}.middle.ckpt"), Trace()
    watching = [watch, trace] if scenario.traced else [watch]
    cloze = [ClozeScorer(config.cloze, config.data.seq_len, config.trainer.val_every)] if config.cloze.points else []
    trainer = pl.Trainer(
        accelerator=accelerator, devices=int(os.environ.get("WORLD_SIZE", 1)), strategy=strategy,
        precision=scenario.precision, max_steps=STEPS, max_epochs=-1, gradient_clip_val=CLIP,
        accumulate_grad_batches=scenario.accumulate, val_check_interval=STEPS // 2 * scenario.accumulate,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False, callbacks=[*watching, *cloze],
        enable_checkpointing=False, use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    data = TokenDataModule(config.data, config.seed, scenario.accumulate)
    if first:
        first(trainer, module, data)
    resume_from = folder.parent / f"{scenario.resume}.middle.ckpt" if scenario.resume else None
    result = {}
    if scenario.strategy.startswith("expert_parallel"):
        with Rows(module, strategy) as rows:
            trainer.fit(module, data, ckpt_path=resume_from)
        totals = torch.tensor([rows.local, rows.remote, rows.wire], device=strategy.root_device)
        dist.all_reduce(totals)
        result = dict(zip(("local", "remote", "wire"), totals.tolist(), strict=True))
    else:
        trainer.fit(module, data, ckpt_path=resume_from)
    trainer.save_checkpoint(folder / f"{scenario.name}.ckpt", weights_only=True)
    if scenario.strategy != "single":
        held = sum(local(p).numel() for bank in expert_banks(module) for p in bank.parameters())
        least = strategy.reduce(torch.tensor(-held, device=strategy.root_device), reduce_op="max")
        result["least_held"] = -int(least)  # numbers of experts on the device that has fewest
    watched = {name: getattr(watch, name) for name in WATCHED}
    return result | watched | {"trace": trace.began}


def run_rank(rank: int, processes: int, port: int, tokens: str, folder: Path, scenarios: list[Scenario]) -> None:
    """Rank `rank` of `processes`, as torchrun would have started it; each result is a file in `folder`."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "scenarios"}
    os.environ.update({name: str(value) for name, value in (ranks | address).items()})
    torch.set_num_threads(1)
    for scenario in scenarios:
        with mock.patch.object(cross_entropy, "WHOLE", 1000 if scenario.chunked else cross_entropy.WHOLE):
            result = run_scenario(scenario, tokens, folder)
        if rank == 0:
            (folder / f"{scenario.name}.json").write_text(json.dumps(result))


def in_processes(tokens: str, root: Path) -> None:
    """All scenarios of two processes, then all of four, which find everything loaded when they are forked."""
    for folder, processes, scenarios in (("two", 2, TWO_DEVICES), ("four", 4, FOUR_DEVICES)):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        arguments = (processes, port, tokens, root / folder, scenarios)
        torch.multiprocessing.start_processes(run_rank, arguments, processes, start_method="fork")
