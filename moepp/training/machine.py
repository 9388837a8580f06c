"""What a run asks of the machine that it trains on."""

import sys

import torch

from moepp.errors import UsageError
from moepp.layers.kernels.cpu import multiplies_bfloat16
from moepp.models.settings import DecoderConfig
from moepp.training.compiled import refuse_what_cannot_be_compiled
from moepp.training.settings import TrainerConfig


def refuse_what_the_machine_lacks(trainer: TrainerConfig, model: DecoderConfig) -> None:
    """UsageError in one line that names what is not here and the key that asks for it."""
    gpus = torch.cuda.device_count()
    if trainer.accelerator in ("gpu", "cuda") and not gpus:
        raise UsageError(f"trainer.accelerator={trainer.accelerator}: no GPU is visible; use cpu or auto")
    if uses_gpus(trainer) and trainer.devices > gpus:
        raise UsageError(f"trainer.devices={trainer.devices}, but {gpus} GPUs are visible on this machine")
    if trainer.cuda_graphs and not uses_gpus(trainer):
        raise UsageError("trainer.cuda_graphs=true needs a GPU; set trainer.cuda_graphs=false")
    if trainer.compile:
        refuse_what_cannot_be_compiled(model, uses_gpus(trainer))


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
