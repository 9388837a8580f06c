"""Times the scoring of multiple-choice questions: ours beside a plain loop over transformers' model of the same
weights, as `export` writes it.
"""

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from moepp.benchmarks.failures import DeviceLost, attempt, describe_failure
from moepp.benchmarks.tables import Columns, Row, markdown_table
from moepp.config import compose
from moepp.models.attention import KeyValueCache
from moepp.models.decoder import Decoder
from moepp.training.interleaved import interleaved_times
from moepp.training.settings import RunConfig

Request = tuple[list[int], int]  # tokens, and how many at their end are scored
LONGEST_CHOICE = 8  # tokens
COLUMNS: Columns = {
    "size": ("size", ""), "model": ("model", ""), "requests": ("requests", ""),
    "moepp_ms": ("ours, ms", ",.0f"), "transformers_ms": ("plain loop, ms", ",.0f"),
    "over_transformers": ("over the plain loop", ".2f"), "difference": ("largest difference, nats", ".1e"),
    "failure": ("failure", ""),
}  # fmt: skip


@dataclass(frozen=True)
class ScoringGroup:
    """One model, scored both ways."""

    size: str
    model: str

    def __str__(self) -> str:
        return f"size={self.size}, {self.model}"


class DecoderReader:
    """A decoder that scores."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def caches(self) -> list[KeyValueCache]:
        return [KeyValueCache() for _ in self.decoder.blocks]

    @torch.inference_mode()
    def logits(
        self, ids_BS: Tensor, at: tuple[Tensor, Tensor] | None = None, caches: list[KeyValueCache] | None = None
    ) -> Tensor:
        return self.decoder(ids_BS, caches, at=at).logits


@dataclass
class ScoringBenchmark:
    """What is measured. Defaults are the laptop scale's model."""

    sizes: list[str] = field(default_factory=lambda: ["tiny"])  # fragments of conf/size
    models: list[str] = field(default_factory=lambda: ["moepp", "vanilla"])  # fragments of conf/model
    questions: int = 16
    choices: int = 4  # of a question
    batch_tokens: int = 4096  # padded tokens that ours reads at a time
    repeats: int = 5
    warmup: int = 1
    seed: int = 0

    TITLE: ClassVar[str] = "The speed of scoring"
    SCALES: ClassVar[dict[str, Row]] = {
        "laptop": {},
        "smoke": {"sizes": ["smoke"], "questions": 2, "repeats": 2},
        "gpu": {"sizes": ["small", "0.6b"], "questions": 64, "batch_tokens": 65_536},
    }

    def groups(self) -> list[ScoringGroup]:
        return [ScoringGroup(size, model) for size in self.sizes for model in self.models]

    def measure(self, group: ScoringGroup, before: list[Row], device: torch.device, out: Path) -> list[Row]:
        if before:  # its failure
            return []
        row = {"size": group.size, "model": group.model}
        try:
            measured, failure = attempt(partial(self._score, group, device))
        except torch.AcceleratorError as error:
            raise DeviceLost(f"{group}: {error}", [row | {"failure": describe_failure(error)}]) from error
        return [row | (measured or {}) | {"failure": failure}]

    def _score(self, group: ScoringGroup, device: torch.device) -> Row:
        scores, calls = {}, self.calls(group, device)

        def scoring(name: str, repeat: int) -> Callable[[], None]:
            return lambda: scores.update({name: calls[name]()})

        times = interleaved_times(calls, scoring, device, self.repeats, self.warmup, self.seed)
        medians = {f"{name}_ms": statistics.median(of_one) for name, of_one in times.items()}
        differences = [abs(ours - theirs) for ours, theirs in zip(*scores.values(), strict=True)]
        over = {"over_transformers": medians["transformers_ms"] / medians["moepp_ms"]}
        return {"requests": len(differences)} | medians | over | {"difference": max(differences)}

    def calls(self, group: ScoringGroup, device: torch.device) -> dict[str, Callable[[], list[float]]]:
        """What scores all requests, in nats."""
        from moepp.evaluation.scoring import log_likelihoods  # it brings lm-evaluation-harness

        config = compose(RunConfig, [f"size={group.size}", f"model={group.model}", "tracking=jsonl"])
        context, requests = config.data.seq_len, self.requests(config.data.seq_len, config.model.vocab_size)
        with device:
            model = Decoder(config.model, self.seed).eval()
        reader, plain = DecoderReader(model), as_transformers(model)

        def ours() -> list[float]:
            found = log_likelihoods(reader, requests, context, self.batch_tokens, device)
            return [likelihood.nats for likelihood in found]

        return {"moepp": ours, "transformers": lambda: [plain_nats(plain, request, device) for request in requests]}

    def requests(self, context: int, vocab_size: int) -> list[Request]:
        """Every choice of every question, behind a prompt of half to all of the context."""
        draw, found = random.Random(self.seed), []
        for _ in range(self.questions):
            prompt = draw.choices(range(vocab_size), k=draw.randint(context // 2, context - LONGEST_CHOICE))
            for _ in range(self.choices):
                choice = draw.choices(range(vocab_size), k=draw.randint(1, LONGEST_CHOICE))
                found.append((prompt + choice, len(choice)))
        return found

    def setup(self) -> str:
        return (
            f"{self.questions} questions with {self.choices} choices each, of random token ids: a prompt of half to all"
            f" of the size's context, choices of 1 to {LONGEST_CHOICE} tokens. Ours reads at most"
            f" {self.batch_tokens:,} padded tokens at a time; the plain loop, over the model as transformers has it,"
            f" one choice at a time with its prompt. Medians of {self.repeats} after {self.warmup}, in turn, float32."
        )

    def table(self, rows: list[Row]) -> list[Row]:
        return rows

    def report(self, rows: list[Row]) -> Iterator[str]:
        return markdown_table(rows, COLUMNS)


def as_transformers(model: Decoder) -> torch.nn.Module:
    """The model that transformers makes of an exported one, with its weights."""
    from moepp.retrofit.modeling_decoder import MoEPlusPlusConfig, MoEPlusPlusForCausalLM
    from moepp.training.export import decoder_keys

    with torch.device("meta"):
        plain = MoEPlusPlusForCausalLM(MoEPlusPlusConfig(**decoder_keys(model)))
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain.eval()


@torch.inference_mode()
def plain_nats(plain: torch.nn.Module, request: Request, device: torch.device) -> float:
    """The log-likelihood of what a request scores, as one writes it down with transformers."""
    tokens, scored = request
    ids_S = torch.tensor(tokens, device=device)
    logits_SV = plain(input_ids=ids_S[None, :-1]).logits[0].float()
    nats_S = logits_SV.log_softmax(-1).gather(1, ids_S[1:, None])
    return float(nats_S[-scored:].sum())
