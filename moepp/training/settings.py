"""The schema of one training run: every component's own dataclass, joined."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from moepp import names, plugins, register
from moepp.config import differences, identity, nearest
from moepp.data.settings import DataConfig
from moepp.layers.bounds import LARGEST, Bounded, Count, NotNegative, Range, Seconds, Seed, Share, Whole
from moepp.models.settings import DecoderConfig
from moepp.records import RunRecord, UnreadableRecord
from moepp.tracking.settings import TrackingConfig

METRICS = {  # that callbacks of a run see, by group; router/ has a share of each expert type beside these
    "train": ("loss", "balance_loss", "grad_norm", "lr", "tokens"),
    "val": ("loss", "accuracy", "bits_per_byte", "divergence"),
    "router": (
        "ffn_per_token", "load_max_over_mean", "entropy", "dropped_share", "dropped_ffn_share", "recomputed_share",
    ),
    "perf": ("tokens_per_s", "step_time_ms", "tflops", "mfu", "peak_mem_gib"),
    "system": ("cpu_percent", "memory_gib", "gpu_percent", "gpu_memory_gib"),
}  # fmt: skip
FINAL = (  # what a run ends with beside final/val_*, the shares of its expert types and what single keys ask for
    "ffn_per_token", "load_max_over_mean", "router_entropy", "dropped_share", "dropped_ffn_share", "recomputed_share",
    *METRICS["perf"], "online_loss", "train_dropped_share", "train_dropped_share_early", "train_dropped_share_late",
    "train_seconds", "stopped_at_step", "active_params", "flops_per_token",
)  # fmt: skip
# How the names of metrics end that rise, and that fall, as a model gets better.
RISING, FALLING = ("accuracy",), ("loss", "bits_per_byte", "divergence")
LATE_SHARE = 0.2  # of all steps: the weights of `trainer.average_checkpoints` lie in these
CLOZE_CHOICES = 4  # continuations to choose from: the text's own and those of other questions


@dataclass
class OptimConfig(Bounded, key="optim"):
    """The optimizer and its schedule, by optimizer steps. Paper, Table B: AdamW, lr 5e-4 -> 5e-5, decay 0.1, clip 1.0;
    betas are not stated there.
    """

    name: str = "adamw"  # or muon (with AdamW beside it), SGD, Adafactor, ... of torch.optim, a registered one
    options: dict[str, Any] = field(default_factory=dict)  # the optimizer's own, beside what follows
    lr: Annotated[float, Range(above=0, most=1000)] = 5e-4  # the highest learning rate, after warm-up
    final_lr_share: Annotated[float, Range(0, 1)] = 0.1  # of lr, which one update more would have
    schedule: Literal["cosine", "wsd"] = "cosine"  # after warm-up: a cosine, or warm-up, stable, decay
    warmup_steps: Whole = 100  # in which the rate rises linearly
    decay_share: Share = 0.2  # wsd: share of all steps spent in the linear decay
    beta1: Annotated[float, Range(0, below=1)] = 0.9  # these three of AdamW; others have their own in options
    beta2: Annotated[float, Range(0, below=1)] = 0.95  # of the second moment
    eps: Annotated[float, Range(0, 1)] = 1e-8  # in the denominator of AdamW's step
    weight_decay: Annotated[float, Range(0, 100)] = 0.1  # decoupled, as AdamW's
    grad_clip: NotNegative = 1.0  # global norm; 0 switches clipping off

    def __post_init__(self) -> None:
        super().__post_init__()
        register.optimizer.check(self.name, self.options)

    def decay_start(self, steps: int) -> int:
        """wsd: the finished steps after which the rate falls, of `steps` in all."""
        return steps - max(1, round(steps * self.decay_share))


@dataclass
class ClozeConfig(Bounded, key="cloze"):
    """Held-out cloze questions at some of the validations: val/cloze_accuracy, val/cloze_bits_per_byte, and what they
    took, perf/cloze_seconds; final/cloze_share is the sum of these over the time of all training steps.
    """

    points: Whole = 0  # how many validations, evenly spread over the schedule; 0: never
    questions: Annotated[int, Range(CLOZE_CHOICES, LARGEST)] = 32  # asked at each of them


@dataclass
class TrainerConfig(Bounded, key="trainer"):
    """How long and how a run trains. Intervals are in optimizer steps."""

    steps: Annotated[int, Range(1, 10**9)] = 1000  # optimizer steps of the whole run
    precision: Literal["32-true", "bf16-mixed"] = "32-true"  # of matrix products; weights stay float32
    compile: bool = False  # the forward and backward pass by torch.compile: faster, but for a minute at the start
    cuda_graphs: bool = False  # with compile, on one GPU: a step's kernels are launched as one
    deterministic: bool = False  # the same bits in every run on the same GPU; slower
    accumulate: Count = 1  # micro-batches per optimizer step
    val_every: Annotated[int, Range(1)] = 100  # steps between validations
    log_every: Annotated[int, Range(1)] = 10  # steps between lines of metrics
    checkpoint_every: Annotated[int, Range(1)] = 100  # steps between states to resume from
    average_checkpoints: Whole = 0  # weights of the last fifth of training whose mean is scored too; 0: none
    expert_timing: bool = True  # measure perf/expert_forward_ms after the last step
    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"  # auto: a GPU where there is one
    devices: Count = 1  # on each node; without GPUs as many processes, which share the cores
    num_nodes: Count = 1  # machines
    collect_every: Whole = 0  # steps between Python's garbage collections, in all processes alike; 0: when each likes
    threads: Annotated[int, Range(0, 4096)] = 0  # CPU threads of each process; 0 leaves torch's choice
    keep_memory: bool = True  # on CPUs, with glibc: freed memory stays with the process, which saves page faults
    keep_at: list[Count] = field(default_factory=list)  # steps whose states stay, for runs of other lengths to begin at
    stop_s: Seconds = 120.0  # for a run that is asked to stop, to finish its step and save; then it is killed
    progress: bool = True  # a bar on the terminal
    profiler: Literal["", "simple", "advanced", "pytorch"] = ""  # of Lightning; its report goes into the run's folder
    callbacks: dict[str, Any] = field(default_factory=dict)  # options by name: EarlyStopping, ModelCheckpoint, ... of
    # Lightning, or registered ones

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, options in self.callbacks.items():
            if not isinstance(options, dict):
                raise ValueError(f"trainer.callbacks.{name}={options} must be a mapping of options, {{}} for none")
            register.callback.check(name, options)
        if self.cuda_graphs and not self.compile:
            raise ValueError("trainer.cuda_graphs=true records what torch.compile made: set trainer.compile=true")

    @property
    def has_foreign_callbacks(self) -> bool:
        """Whether there are callbacks of somebody's own, which may log whatever they like."""
        return any(name not in register.callback.defined for name in self.callbacks)


@dataclass
class StrategyConfig(Bounded, key="strategy"):
    """How parameters and tokens are spread over devices; docs/strategies.md says which is for what.

    Not beside the strategies, whose package registers them with Lightning: a config is read without it.
    """

    name: Literal["single", "ddp", "fsdp", "expert_parallel", "expert_parallel_fsdp"] = "single"  # docs/strategies.md
    expert_parallel_size: Whole = 0  # consecutive devices that share one copy of the experts; 0: all devices
    timeout_s: Seconds = 600.0  # how long a device waits for the others before the run fails
    reduce_every_micro_batch: bool = False  # fsdp: less memory, more traffic; false: reduce a step's gradients once
    shard_size: Whole = 0  # fsdp: consecutive devices that hold one copy of all weights, such as a node's; 0: all
    checkpoints_in_parts: bool = False  # each device writes its own, in the background; false: the first writes all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_size and self.name != "fsdp":
            raise ValueError(
                f"strategy={self.name} has no groups that shard the weights: leave strategy.shard_size out, or choose "
                "strategy=fsdp, or strategy=expert_parallel, which divides the experts of each group's copy"
            )
        if self.checkpoints_in_parts and not self.divides_weights:
            raise ValueError(
                f"strategy={self.name} holds whole weights on every device: leave strategy.checkpoints_in_parts out, "
                "or choose strategy=fsdp, expert_parallel or expert_parallel_fsdp"
            )
        if self.reduce_every_micro_batch and not self.name.endswith("fsdp"):
            raise ValueError(
                f"strategy={self.name} reduces gradients once in a step: leave strategy.reduce_every_micro_batch out, "
                "or choose strategy=fsdp or expert_parallel_fsdp"
            )
        if self.expert_parallel_size and not self.name.startswith("expert_parallel"):
            raise ValueError(
                f"strategy={self.name} divides no experts: leave strategy.expert_parallel_size out, or choose "
                "strategy=expert_parallel or expert_parallel_fsdp"
            )

    @property
    def divides_weights(self) -> bool:
        """Whether no device holds the whole model."""
        return self.name not in ("single", "ddp")


@dataclass
class RunConfig(Bounded):
    """One run. `seed` sets initial weights and batch order; `tags` only label the run.

    `init_from`, a finished run's directory or a run's checkpoint file, gives the initial weights instead; optimizer,
    schedule and batches begin anew. Both runs need the same tokenizer. `init_weights` is their digest, filled in when
    the run is frozen.

    `plugins` are modules, or paths of files, that register parts: those named here, and those whose parts are used.
    `plugin_sources` are the digests of their sources, by name, filled in as well.
    """

    name: str = "train"  # folder of the run below `runs`
    seed: Seed = 0  # of initial weights and batch order
    init_from: str = ""  # a finished run's directory or a checkpoint file, for the initial weights
    init_weights: dict[str, str] = field(default_factory=dict)  # their digest, filled in when the run is frozen
    runs: str = "runs"  # folder of all run records
    plugins: str | list[str] = field(default_factory=list)  # modules or files that register parts; those used are added
    plugin_sources: dict[str, str] = field(default_factory=dict)  # digests of their sources, filled in
    model: DecoderConfig = field(default_factory=DecoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cloze: ClozeConfig = field(default_factory=ClozeConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    tags: dict[str, str] = field(default_factory=dict)  # arm, baseline, sweep, experiment, paper_table

    def __post_init__(self) -> None:
        super().__post_init__()
        names.check("name", [self.name])
        names.check("tags", self.tags)
        names.check_line("runs", self.runs)
        if not self.runs or self.runs.startswith("~"):
            raise ValueError(f"runs={self.runs!r} must be a folder, written out")
        used = [plugins.owner(module) for module in _foreign_modules(self)]
        self.plugins = list(dict.fromkeys([*plugins.listed(self.plugins), *used]))
        self.plugin_sources = plugins.digests(self.plugins) | self.plugin_sources
        for impossible, reason in (*_conflicts(self), *_undivided(self), *_not_compiled(self)):
            if impossible:
                raise ValueError(reason)

    def check_new(self) -> None:
        """What is asked of a run that is to begin, beyond one that is read. Raises ValueError, in one line."""
        for hopeless, reason in (*_hopeless(self), *_never_logged(self), *_turned_round(self.trainer)):
            if hopeless:
                raise ValueError(reason)


def _conflicts(config: RunConfig) -> list[tuple[bool, str]]:
    """Parts of a run that cannot go together: whether these do not, and what to change."""
    trainer, strategy = config.trainer, config.strategy
    divides_experts = strategy.name.startswith("expert_parallel")
    return [
        (
            strategy.name == "single" and trainer.devices * trainer.num_nodes > 1,
            f"strategy=single trains on one device, not on trainer.devices={trainer.devices} times "
            f"trainer.num_nodes={trainer.num_nodes}; choose another, such as strategy=ddp",
        ),
        (
            config.model.name == "hf" and divides_experts,
            f"strategy={strategy.name} divides this package's own experts, not those of model=hf: choose strategy=ddp "
            "or fsdp",
        ),
        (
            config.model.ffn_rows is not None and divides_experts,
            f"strategy={strategy.name} computes the rows that arrive, however many: leave model.ffn_rows out, or "
            "choose strategy=ddp or fsdp",
        ),
        (
            config.optim.name == "muon" and strategy.name in ("fsdp", "expert_parallel_fsdp"),
            f"optim.name=muon needs whole matrices, and strategy={strategy.name} divides them: choose strategy=ddp or "
            "expert_parallel, or optim.name=adamw",
        ),
        (
            trainer.average_checkpoints > 0 and strategy.divides_weights,
            f"trainer.average_checkpoints={trainer.average_checkpoints} averages whole weights, and "
            f"strategy={strategy.name} divides them: set it to 0, or choose strategy=single or ddp",
        ),
        (
            "StochasticWeightAveraging" in trainer.callbacks and strategy.divides_weights,
            f"trainer.callbacks.StochasticWeightAveraging averages whole weights, and strategy={strategy.name} divides "
            "them: leave it out, or choose strategy=single or ddp",
        ),
        (
            config.data.batch_size % (trainer.devices * trainer.num_nodes * trainer.accumulate) > 0,
            _uneven_batch(config),
        ),
    ]


def _uneven_batch(config: RunConfig) -> str:
    batch, accumulate = config.data.batch_size, config.trainer.accumulate
    devices = config.trainer.devices * config.trainer.num_nodes
    fewer = [n for n in range(1, accumulate) if batch % (devices * n) == 0]
    return (
        f"data.batch_size={batch} cannot be divided among {devices} devices with trainer.accumulate={accumulate} each;"
        f" use a multiple of {devices * accumulate}" + (f", or trainer.accumulate={fewer[-1]}" if fewer else "")
    )


def _hopeless(config: RunConfig) -> list[tuple[bool, str]]:
    """What would train to its end and teach nothing, or not what was asked: whether it is so, and what to change."""
    model, optim, steps = config.model, config.optim, config.trainer.steps
    averaged, late = config.trainer.average_checkpoints, int(LATE_SHARE * steps)
    counts, common = model.experts, optim.decay_start(steps) if optim.schedule == "wsd" else 0
    decaying = [step for step in config.trainer.keep_at if step > common]
    weighed = counts.total - counts.zero if model.gate == "released" else counts.total
    one = weighed == 1 or (model.selection in ("top_k", "sigmoid") and model.top_k == 1)
    return [
        (
            model.moe_every > 0 and model.gate in ("released", "renormalized") and one,
            f"model.gate={model.gate} divides a single gate by itself, which gives 1 whatever the router says, so that"
            " it learns nothing: set model.gate=softmax, or model.top_k above 1",
        ),
        (
            1 < steps < optim.warmup_steps,
            f"optim.warmup_steps={optim.warmup_steps} is more than trainer.steps={steps}, so the rate never reaches"
            f" optim.lr={optim.lr}: set it to {steps} at most, or train longer",
        ),
        (
            optim.schedule == "wsd" and common < optim.warmup_steps < steps,
            f"optim.decay_share={optim.decay_share} lets the rate fall after step {common} of trainer.steps={steps},"
            f" and optim.warmup_steps={optim.warmup_steps} lets it rise until later: lower one, or train longer",
        ),
        (
            config.data.vocab_size > model.vocab_size,
            f"data.vocab_size={config.data.vocab_size} is more ids than the embedding has rows,"
            f" model.vocab_size={model.vocab_size}: set model.vocab_size, which the data follow",
        ),
        (
            averaged > late,
            f"trainer.average_checkpoints={averaged} is more than the last fifth of trainer.steps={steps} has, and"
            f" weights before it are not averaged: set it to {late}{' at most' if late else ''}, or train longer",
        ),
        (
            bool(decaying),
            f"trainer.keep_at={decaying and decaying[0]}: no run of another length may begin there, for the rate falls"
            f" already; with optim.schedule=wsd it falls after step {optim.decay_start(steps)} of {steps}",
        ),
    ]


def metrics_of(config: RunConfig) -> list[str]:
    """What the lines of a run's metrics.jsonl may hold. What callbacks of somebody's own log beside it only they can
    tell.
    """
    trainer, model = config.trainer, config.model
    final = [*FINAL, *(f"{kind}_share" for kind in model.experts.by_kind())]
    final += [f"train_dropped_share_layer_{layer}" for layer in range(1, len(model.moe_blocks) + 1)]
    for prefix in ("val", *(["averaged_val"] if trainer.average_checkpoints else [])):
        final += [f"{prefix}_{name}" for name in METRICS["val"]]
    final += ["expert_forward_ms", "expert_forward_ms_balanced"] if trainer.expert_timing else []
    final += ["cloze_share"] if config.cloze.points else []
    cloze = ["val/cloze_accuracy", "val/cloze_bits_per_byte", "perf/cloze_seconds"] if config.cloze.points else []
    return [*_seen_by_callbacks(model), *cloze, *(f"final/{name}" for name in final)]


def _seen_by_callbacks(model: DecoderConfig) -> list[str]:
    shares = [f"router/{kind}_share" for kind in model.experts.by_kind()]
    return [*(f"{group}/{name}" for group, names in METRICS.items() for name in names), *shares]


def _never_logged(config: RunConfig) -> list[tuple[bool, str]]:
    """What callbacks would look for in vain: whether it is asked for, and what to choose from. What callbacks of
    somebody's own log only they can tell.
    """
    callbacks, known = config.trainer.callbacks, _seen_by_callbacks(config.model)
    asked = {name: options["monitor"] for name, options in callbacks.items() if options.get("monitor")}
    return [
        (
            not config.trainer.has_foreign_callbacks and monitor not in known,
            f"trainer.callbacks.{name}.monitor={monitor}: no such metric; choose from val/loss, val/accuracy, "
            f"val/bits_per_byte, train/loss or others that a run's metrics.jsonl has{nearest(str(monitor), known)}",
        )
        for name, monitor in asked.items()
    ]


def _turned_round(trainer: TrainerConfig) -> list[tuple[bool, str]]:
    """Callbacks that take the worse value of a metric for the better one, as Lightning's do of an accuracy where no
    mode is given: whether one does, and what to change.
    """
    chosen = {name: trainer.callbacks.get(name) or {} for name in ("EarlyStopping", "ModelCheckpoint")}
    asked = [(name, str(options.get("monitor")), options.get("mode", "min")) for name, options in chosen.items()]
    return [
        (
            monitor.endswith(FALLING if mode == "max" else RISING),
            f"trainer.callbacks.{name}.mode={mode} takes the worse {monitor} for the better one: set"
            f" trainer.callbacks.{name}.mode={'min' if mode == 'max' else 'max'}",
        )
        for name, monitor, mode in asked
    ]


def _foreign_modules(config: RunConfig) -> list[str]:
    """Those that define the parts which are not the package's own."""
    model, balance = config.model, config.model.balance
    used = [
        (register.model, [model.name]),
        (register.router, [model.router]),
        (register.expert, model.experts.others),
        (register.selection, [model.selection]),
        (register.gate, [model.gate]),
        (register.balance, [balance.form]),
        (register.control, [balance.control] if balance.control else []),
        (register.corpus, [config.data.corpus]),
        (register.optimizer, [config.optim.name]),
        (register.callback, config.trainer.callbacks),
        (register.logger, config.tracking.loggers),
    ]
    return [registry.module(name) for registry, names in used for name in names if name not in registry.defined]


def _undivided(config: RunConfig) -> list[tuple[bool, str]]:
    """What these devices cannot share: whether it is asked for, and what to change."""
    strategy, devices = config.strategy, config.trainer.devices * config.trainer.num_nodes
    sizes = {key: getattr(strategy, key) for key in ("expert_parallel_size", "shard_size")}
    shares_experts, group = strategy.name.startswith("expert_parallel"), strategy.expert_parallel_size or devices
    uneven = [layer.experts.ffn for layer in config.model.moe_configs if layer.experts.ffn % group]
    return [
        *(
            (
                size > 0 and devices % size > 0,
                f"strategy.{key}={size} does not divide {devices} devices (trainer.devices times trainer.num_nodes):"
                " set it to a divisor, or to 0 for all",
            )
            for key, size in sizes.items()
        ),
        (
            shares_experts and bool(uneven),
            f"model.experts.ffn={uneven and uneven[0]} cannot be divided among {group} devices, as"
            f" strategy={strategy.name} does: choose a multiple, or a strategy.expert_parallel_size that divides it",
        ),
        (
            shares_experts and not config.model.moe_blocks,
            f"strategy={strategy.name} divides experts, and model.moe_every={config.model.moe_every} leaves none:"
            " choose strategy=ddp or fsdp",
        ),
    ]


def _not_compiled(config: RunConfig) -> list[tuple[bool, str]]:
    """What torch.compile does not take: whether it is asked for, and what to change."""
    if not config.trainer.compile:
        return []
    strategy = config.strategy.name
    return [
        (
            config.model.name == "hf",
            "trainer.compile=true compiles this package's own decoder, not model=hf: set trainer.compile=false",
        ),
        (
            strategy not in ("single", "ddp", "fsdp"),
            f"trainer.compile=true with strategy={strategy} would compile anew for the sizes of every step: set "
            "trainer.compile=false, or choose strategy=ddp or fsdp",
        ),
        (
            config.model.backend == "grouped" and config.trainer.precision != "bf16-mixed",
            "trainer.compile=true takes model.backend=grouped in bfloat16 only: set trainer.precision=bf16-mixed, or "
            "model.backend=auto",
        ),
        (
            config.trainer.cuda_graphs and strategy != "single",
            f"trainer.cuda_graphs=true records one device, and strategy={strategy} communicates: set "
            "trainer.cuda_graphs=false",
        ),
    ]


# What cannot change a result: a run moved to other devices, folders or trackers is still the same run.
NOT_IDENTITY = (
    "name", "runs", "tags", "plugins", "init_from", "model.path", "model.backend", "model.ffn_rows", "tracking",
    "cloze", "data.cache", "data.workers", "trainer.compile", "trainer.cuda_graphs", "trainer.deterministic",
    "trainer.log_every", "trainer.checkpoint_every", "trainer.expert_timing", "trainer.accelerator", "trainer.devices",
    "trainer.num_nodes", "trainer.collect_every", "trainer.threads", "trainer.stop_s", "trainer.keep_at",
    "trainer.progress",
    "trainer.profiler", "strategy",
)  # fmt: skip


def run_directory(config: RunConfig) -> Path:
    """`runs/<name>/<identity>`: the same config always finds its own record, checkpoint and MLflow run."""
    return Path(config.runs) / config.name / identity(config, NOT_IDENTITY)


def changed_settings(record: RunRecord, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (begun with, asked for now)}: the identity leaves out defaults, so a record may lie where `config`
    belongs and have been begun before a default changed. Empty for a record without a config that can be read.
    """
    with suppress(UnreadableRecord):
        if saved := record.read("config.yaml"):
            return differences(saved, config, NOT_IDENTITY)
    return {}


def say_changes(changed: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key}: {then} then, {now} now" for key, (then, now) in changed.items())
