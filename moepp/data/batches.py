"""Token files to batches, in an order that depends on the seed alone: not on devices, micro-batches, resumption."""

import itertools
from collections.abc import Iterator

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moepp.data.prepare import prepare
from moepp.data.settings import DataConfig
from moepp.data.token_files import TokenFiles
from moepp.data.windows import epoch_order, evenly_spread, gather_windows, window_count
from moepp.errors import UsageError

VALIDATED_TOKENS = 4096  # at least, in a forward pass: of fewer, most of the time goes to calls


class TrainWindows(Dataset):
    """Windows of S + 1 tokens, S apart: each token is a target once per epoch. Indexed by a whole batch of windows."""

    def __init__(self, files: TokenFiles, seq_len: int):
        self.files, self.seq_len = files, seq_len

    def __len__(self) -> int:
        return window_count(self.files.header.train.tokens, self.seq_len)

    def __getitem__(self, windows: np.ndarray) -> Tensor:
        """[B] window numbers -> tokens [B, S + 1], int64."""
        return torch.from_numpy(gather_windows(self.files.train, windows, self.seq_len))


class ValWindows(Dataset):
    """The held-out windows, each with the UTF-8 bytes that its targets stand for."""

    def __init__(self, files: TokenFiles, seq_len: int):
        self.files, self.seq_len = files, seq_len

    def __len__(self) -> int:
        return window_count(self.files.header.val.tokens, self.seq_len)

    def __getitem__(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """[B] window numbers -> tokens [B, S + 1] and bytes of each target [B, S], int64."""
        ids, lengths = (gather_windows(of, windows, self.seq_len) for of in (self.files.val, self.files.val_lengths))
        return torch.from_numpy(ids), torch.from_numpy(lengths[:, 1:])


class StepSampler:
    """Window numbers of one rank's micro-batches, without end, from optimizer step `first_step` on.

    Epoch e visits all windows in a permutation seeded by (seed, e), of the kind that `order` names. The permutations
    follow one another, and step s takes positions s * batch_size to (s + 1) * batch_size: a batch may straddle two
    epochs, and no window is ever left out. The step's windows are cut into micro-batches, and each of these into the
    ranks' shares, so how many there are cannot change what a step learns from.
    """

    def __init__(
        self, windows: int, batch_size: int, seed: int, first_step: int = 0,
        accumulate: int = 1, rank: int = 0, world_size: int = 1, order: str = "permuted",
    ):  # fmt: skip
        self.windows, self.batch_size, self.seed, self.first_step = windows, batch_size, seed, first_step
        self.accumulate, self.rank, self.world_size, self.order = accumulate, rank, world_size, order

    def __iter__(self) -> Iterator[np.ndarray]:
        epoch, permutation = -1, np.empty(0, dtype=np.int64)
        for step in itertools.count(self.first_step):
            positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
            chosen = np.empty(self.batch_size, dtype=np.int64)
            for needed in np.unique(positions // self.windows):
                if needed != epoch:
                    epoch, permutation = needed, epoch_order(self.windows, self.seed, needed, self.order)
                inside = positions // self.windows == epoch
                chosen[inside] = permutation[positions[inside] % self.windows]
            yield from chosen.reshape(self.accumulate, self.world_size, -1)[:, self.rank]


class TokenDataModule(pl.LightningDataModule):
    """Prepares the tokens of `config` and serves their batches.

    Training batches are tokens [B, S + 1], without end, beginning at the trainer's finished optimizer step, so that a
    resumed run goes on where it stopped; B is `batch_size` divided among devices and micro-batches. Validation batches
    are (tokens [B, S + 1], bytes of each target [B, S]), the same windows in the same order every time, as many as a
    micro-batch has, or those of VALIDATED_TOKENS where that is more. The trainer needs `use_distributed_sampler=False`.
    Raises UsageError for a batch that cannot be divided evenly.
    """

    def __init__(self, config: DataConfig, seed: int, accumulate: int = 1):
        super().__init__()
        self.config, self.seed, self.accumulate = config, seed, accumulate
        self.val_sequences = config.val_sequences

    def prepare_data(self) -> None:
        prepare(self.config)

    def setup(self, stage: str) -> None:
        parts = self.trainer.world_size * self.accumulate
        if self.config.batch_size % parts:
            raise UsageError(
                f"data.batch_size={self.config.batch_size} cannot be divided among {self.trainer.world_size} devices "
                f"with trainer.accumulate={self.accumulate} each; use a multiple of {parts}"
            )
        self.micro_batch_size = self.config.batch_size // parts
        self.files = prepare(self.config, progress=False)

    def train_dataloader(self) -> DataLoader:
        windows = TrainWindows(self.files, self.config.seq_len)
        return self._loader(windows, self._sampler(windows, self.trainer.global_step))

    def micro_batches(self, step: int) -> list[Tensor]:
        """This rank's of an optimizer step, which the training batches serve as well."""
        windows = TrainWindows(self.files, self.config.seq_len)
        chosen = itertools.islice(self._sampler(windows, step), self.accumulate)
        return [windows[of_one] for of_one in chosen]

    def _sampler(self, windows: TrainWindows, first_step: int) -> StepSampler:
        return StepSampler(
            len(windows), self.config.batch_size, self.seed, first_step,
            self.accumulate, self.trainer.global_rank, self.trainer.world_size, self.config.order,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Windows evenly spread over the held-out split; rank r takes the r-th of every world_size.

        All ranks get equally many batches, since they meet in every one; the last holds a window more on some ranks.
        """
        chosen, world = self.validated_windows(), self.trainer.world_size
        mine, least = chosen[self.trainer.global_rank :: world], len(chosen) // world
        size = max(self.micro_batch_size, VALIDATED_TOKENS // self.config.seq_len)
        batches = np.split(mine, np.arange(size, least, size))
        return self._loader(ValWindows(self.files, self.config.seq_len), batches)

    def validated_windows(self) -> np.ndarray:
        """The windows of all ranks, however many these are. Raises UsageError where there are fewer than ranks."""
        windows, world = len(ValWindows(self.files, self.config.seq_len)), self.trainer.world_size
        chosen = evenly_spread(windows, self.val_sequences)
        if len(chosen) < world:
            raise UsageError(f"{world} devices need at least as many validation sequences; hold out more text")
        return chosen

    def _loader(self, windows: Dataset, sampler: StepSampler | list[np.ndarray]) -> DataLoader:
        # batch_size=None: the sampler's items are whole batches already.
        return DataLoader(
            windows, batch_size=None, sampler=sampler, num_workers=self.config.workers,
            persistent_workers=self.config.workers > 0, pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
