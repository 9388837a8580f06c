"""DeepSpeed's ZeRO with whole experts. Has not run: it needs CUDA devices and the deepspeed package."""

from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from moepp.errors import UsageError
from moepp.strategies.dispatch import SharedBatchDispatcher
from moepp.strategies.sharding import expert_banks


class MoEDeepSpeedStrategy(DeepSpeedStrategy):
    """ZeRO on the model with all its experts, and the load balance of the whole batch.

    Clips and writes checkpoints as DeepSpeed does: folders, which no other strategy reads.
    """

    def __init__(self, timeout_s: float = 600.0, stage: int = 2, **options: Any):
        if find_spec("deepspeed") is None:
            raise UsageError(
                "strategy=deepspeed needs the deepspeed package: pip install deepspeed; strategy=fsdp shards without it"
            )
        if not torch.cuda.is_available():
            raise UsageError("strategy=deepspeed needs CUDA devices; strategy=fsdp runs without")
        super().__init__(stage=stage, timeout=timedelta(seconds=timeout_s), **options)

    def setup(self, trainer: pl.Trainer) -> None:
        for bank in expert_banks(self.lightning_module):
            bank.dispatcher = SharedBatchDispatcher(bank.dispatcher.backend)
        super().setup(trainer)
