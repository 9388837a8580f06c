"""The schema of one training run: every component's own dataclass, joined."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moepp import plugins, register
from moepp.config import differences, identity
from moepp.data.settings import DataConfig
from moepp.models.settings import DecoderConfig
from moepp.records import RunRecord, UnreadableRecord
from moepp.tracking.settings import TrackingConfig

CLOZE_CHOICES = 4  # continuations to choose from: the text's own and those of other questions


@dataclass
class OptimConfig:
    """The optimizer and its schedule, by optimizer steps. Paper, Table B: AdamW, lr 5e-4 -> 5e-5, decay 0.1, clip 1.0;
    betas are not stated there.
    """

    name: str = "adamw"  # or muon (with AdamW beside it), SGD, Adafactor, ... of torch.optim, a registered one
    options: dict[str, Any] = field(default_factory=dict)  # the optimizer's own, beside what follows
    lr: float = 5e-4
    final_lr_share: float = 0.1  # of lr, reached at the last step
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_share: float = 0.2  # wsd: share of all steps spent in the linear decay
    beta1: float = 0.9  # these three of AdamW; others have their own in options
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # global norm; 0 switches clipping off

    def __post_init__(self) -> None:
        register.optimizer.check(self.name, self.options)
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr} must be positive")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"optim.decay_share={self.decay_share} must lie in (0, 1]")


@dataclass
class ClozeConfig:
    """Held-out cloze questions at some of the validations: val/cloze_accuracy, val/cloze_bits_per_byte, and what they
    took, perf/cloze_seconds; final/cloze_share is the sum of these over the time of all training steps.
    """

    points: int = 0  # how many validations, evenly spread over the schedule; 0: never
    questions: int = 32

    def __post_init__(self) -> None:
        if self.points < 0 or self.questions < CLOZE_CHOICES:
            raise ValueError(f"cloze.points must not be negative, and cloze.questions at least {CLOZE_CHOICES}")


@dataclass
class TrainerConfig:
    """How long and how a run trains. Intervals are in optimizer steps."""

    steps: int = 1000
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compile: bool = False  # the forward and backward pass by torch.compile: faster, but for a minute at the start
    cuda_graphs: bool = False  # with compile, on one GPU: a step's kernels are launched as one
    deterministic: bool = False  # the same bits in every run on the same GPU; slower
    accumulate: int = 1  # micro-batches per optimizer step
    val_every: int = 100
    log_every: int = 10
    checkpoint_every: int = 100
    expert_timing: bool = True  # measure perf/expert_forward_ms after the last step
    accelerator: str = "auto"
    devices: int = 1  # on each node; without GPUs as many processes, which share the cores
    num_nodes: int = 1
    threads: int = 0  # CPU threads of each process; 0 leaves torch's choice
    stop_s: float = 120.0  # for a run that is asked to stop, to finish its step and save; then it is killed
    progress: bool = True
    profiler: Literal["", "simple", "advanced", "pytorch"] = ""  # of Lightning; its report goes into the run's folder
    callbacks: dict[str, Any] = field(default_factory=dict)  # options by name: EarlyStopping, ModelCheckpoint, ... of
    # Lightning, or registered ones

    def __post_init__(self) -> None:
        for name, options in self.callbacks.items():
            if not isinstance(options, dict):
                raise ValueError(f"trainer.callbacks.{name}={options} must be a mapping of options, {{}} for none")
            register.callback.check(name, options)
        for name in ("steps", "accumulate", "val_every", "log_every", "checkpoint_every", "devices", "num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)} must be at least 1")
        if self.stop_s <= 0:
            raise ValueError(f"trainer.stop_s={self.stop_s} must be positive")
        if self.cuda_graphs and not self.compile:
            raise ValueError("trainer.cuda_graphs=true records what torch.compile made: set trainer.compile=true")


@dataclass
class StrategyConfig:
    """How parameters and tokens are spread over devices; docs/strategies.md says which is for what.

    Not beside the strategies, whose package registers them with Lightning: a config is read without it.
    """

    name: Literal["single", "ddp", "fsdp", "expert_parallel", "expert_parallel_fsdp", "deepspeed"] = "single"
    expert_parallel_size: int = 0  # consecutive devices that share one copy of the experts; 0: all devices
    timeout_s: float = 600.0  # how long a device waits for the others before the run fails

    def __post_init__(self) -> None:
        if self.expert_parallel_size < 0:
            raise ValueError(f"strategy.expert_parallel_size={self.expert_parallel_size} must not be negative")
        if self.expert_parallel_size and not self.name.startswith("expert_parallel"):
            raise ValueError(
                f"strategy={self.name} divides no experts: leave strategy.expert_parallel_size out, or choose "
                "strategy=expert_parallel or expert_parallel_fsdp"
            )
        if self.timeout_s <= 0:
            raise ValueError(f"strategy.timeout_s={self.timeout_s} must be positive")


@dataclass
class RunConfig:
    """One run. `seed` sets initial weights and batch order; `tags` only label the run.

    `init_from`, a finished run's directory or a run's checkpoint file, gives the initial weights instead; optimizer,
    schedule and batches begin anew. Both runs need the same tokenizer. `init_weights` is their digest, filled in when
    the run is frozen.

    `plugins` are modules, or paths of files, that register parts: those named here, and those whose parts are used.
    `plugin_sources` are the digests of their sources, by name, filled in as well.
    """

    name: str = "train"
    seed: int = 0
    init_from: str = ""
    init_weights: dict[str, str] = field(default_factory=dict)
    runs: str = "runs"  # folder of all run records
    plugins: str | list[str] = field(default_factory=list)
    plugin_sources: dict[str, str] = field(default_factory=dict)
    model: DecoderConfig = field(default_factory=DecoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cloze: ClozeConfig = field(default_factory=ClozeConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    tags: dict[str, str] = field(default_factory=dict)  # arm, baseline, sweep, experiment, paper_table

    def __post_init__(self) -> None:
        used = [plugins.owner(module) for module in _foreign_modules(self)]
        self.plugins = list(dict.fromkeys([*plugins.listed(self.plugins), *used]))
        self.plugin_sources = plugins.digests(self.plugins) | self.plugin_sources
        trainer, devices = self.trainer, self.trainer.devices * self.trainer.num_nodes
        if self.strategy.name == "single" and devices > 1:
            raise ValueError(
                f"strategy=single trains on one device, not on trainer.devices={trainer.devices} times "
                f"trainer.num_nodes={trainer.num_nodes}; choose another, such as strategy=ddp"
            )
        if self.optim.name == "muon" and self.strategy.name in ("fsdp", "expert_parallel_fsdp", "deepspeed"):
            raise ValueError(
                f"optim.name=muon needs whole matrices, and strategy={self.strategy.name} divides them: choose "
                "strategy=ddp or expert_parallel, or optim.name=adamw"
            )
        parts = devices * trainer.accumulate
        if self.data.batch_size % parts:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} cannot be divided among {devices} devices with "
                f"trainer.accumulate={trainer.accumulate} each; use a multiple of {parts}"
            )
        for impossible, reason in _not_compiled(self) if trainer.compile else ():
            if impossible:
                raise ValueError(reason)


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


def _not_compiled(config: RunConfig) -> list[tuple[bool, str]]:
    """What torch.compile does not take: whether it is asked for, and what to change."""
    strategy = config.strategy.name
    return [
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
    "name", "runs", "tags", "plugins", "init_from", "model.backend", "model.ffn_rows", "tracking", "cloze",
    "data.cache", "data.workers", "trainer.compile", "trainer.cuda_graphs", "trainer.deterministic",
    "trainer.log_every", "trainer.checkpoint_every", "trainer.expert_timing", "trainer.accelerator", "trainer.devices",
    "trainer.num_nodes", "trainer.threads", "trainer.stop_s", "trainer.progress", "trainer.profiler", "strategy",
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
