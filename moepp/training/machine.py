"""What a run asks of the machine that it trains on."""

import os
import sys

import torch

from moepp.errors import UsageError
from moepp.layers.kernels.cpu import multiplies_bfloat16
from moepp.training.compiled import refuse_what_cannot_be_compiled
from moepp.training.estimate import device_memory
from moepp.training.settings import RunConfig, TrainerConfig

ROOM = 4  # of a step's estimated memory over the machine's: beyond it no error of the estimate makes it fit


def refuse_what_the_machine_lacks(config: RunConfig) -> None:
    """UsageError in one line that names what is not here and the key that asks for it."""
    trainer, gpus = config.trainer, torch.cuda.device_count()
    if trainer.accelerator in ("gpu", "cuda") and not gpus:
        raise UsageError(f"trainer.accelerator={trainer.accelerator}: no GPU is visible; use cpu or auto")
    if uses_gpus(trainer) and trainer.devices > gpus:
        raise UsageError(f"trainer.devices={trainer.devices}, but {gpus} GPUs are visible on this machine")
    if trainer.cuda_graphs and not uses_gpus(trainer):
        raise UsageError("trainer.cuda_graphs=true needs a GPU; set trainer.cuda_graphs=false")
    if trainer.compile:
        refuse_what_cannot_be_compiled(config.model, uses_gpus(trainer))
    if config.model.name == "decoder":
        _refuse_a_step_without_room(config)


def _refuse_a_step_without_room(config: RunConfig) -> None:
    """Before anything is allocated, where the estimate is so far above what is there that its errors do not matter."""
    trainer = config.trainer
    needed, there = trainer.devices * sum(device_memory(config).values()), memory_bytes(trainer)
    if needed > ROOM * there:
        raise UsageError(
            f"a step takes about {needed / 2**30:,.0f} GiB on this machine, which has {there / 2**30:,.1f} GiB: choose"
            " a smaller model, data.batch_size or data.seq_len, or more trainer.accumulate; --dry-run says more"
        )


def memory_bytes(trainer: TrainerConfig) -> int:
    """Of the run's GPUs here together, or of the machine."""
    if uses_gpus(trainer):
        return sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(trainer.devices))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_memory(error: Exception) -> bool:
    """On CPUs torch raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def warn_of_slow_products(trainer: TrainerConfig) -> None:
    """Of a precision that this CPU would only imitate."""
    if trainer.precision == "bf16-mixed" and not uses_gpus(trainer) and not multiplies_bfloat16():
        print(
            "warning: trainer.precision=bf16-mixed: this CPU multiplies no bfloat16 itself (it has no AVX512-BF16 or "
            "AMX), so FFN experts are multiplied in float32 and all else takes many times as long; use 32-true",
            file=sys.stderr,
        )


def uses_gpus(trainer: TrainerConfig) -> bool:
    return trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
