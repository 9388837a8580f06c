"""The decoder as a model of lm-evaluation-harness, registered there as `moepp`."""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer
from tqdm import tqdm

from moepp.errors import UsageError
from moepp.evaluation.checkpoints import Checkpoint, load_checkpoint
from moepp.evaluation.scoring import Tokens, log_likelihoods

MAX_NEW_TOKENS = 256  # the harness's default


# The choices of a question share their context, and models with one tokenizer are asked the same; a prompt of 32
# examples takes longer to tokenise than its end to score.
@lru_cache(maxsize=2**14)
def _encode(tokenizer: Tokenizer, text: str) -> array:
    return array("I", tokenizer.encode(text, add_special_tokens=False).ids)


class MoEPlusPlus(TemplateLM):
    """Scores and continues text with a checkpoint of this project or a released one (`load_checkpoint`).

    Contexts are cut from the left where a request exceeds the model's context, and `cut` counts these requests; what
    is scored is never cut. `batch_tokens` limits the padded tokens of a batch. The harness's own `batch_size`, which
    it passes in rows, is not used. `progress` is where bars are drawn.
    """

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        device: str | None = None,
        dtype: str | None = None,
        batch_tokens: int = 4096,
        progress: TextIO | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise UsageError(f"dtype={dtype} is no floating-point type of torch; use float32 or bfloat16")
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = load_checkpoint(Path(checkpoint), device, getattr(torch, dtype) if dtype else None)
        self.checkpoint, self.batch_tokens, self.progress = checkpoint, int(batch_tokens), progress
        self._device = checkpoint.device
        self._tokenizer = checkpoint.require_tokenizer()
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        return self.checkpoint.end_of_text

    @property
    def prefix_token_id(self) -> int:
        return self.checkpoint.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: object) -> list[int]:
        return [*self.checkpoint.begin, *_encode(self._tokenizer, string)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **options: object
    ) -> list[tuple[float, bool]]:
        whole = [(context + scored, len(scored)) for _, context, scored in requests]
        self.cut += sum(len(tokens) > self.checkpoint.context + 1 for tokens, _ in whole)
        return self._score(whole)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: each token has at least half a context of the text before it, or all of it."""
        texts = [list(_encode(self._tokenizer, request.args[0])) for request in requests]
        return [nats for nats, _ in self._score([(self._begun(text), len(text)) for text in texts])]

    def _begun(self, text: list[int]) -> list[int]:
        return [*(self.checkpoint.begin or (self.prefix_token_id,)), *text]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to the first stop string or the end-of-text token.

        They take at most half of the context; the prompt keeps its end. Raises UsageError for sampling.
        """
        found: dict[int, str] = {}
        groups: dict[tuple[int, int, tuple[str, ...]], list[int]] = {}
        prompts: dict[int, Tokens] = {}
        for number, request in enumerate(requests):
            text, options = request.args
            new, stops = self._generation(options)
            room = self.checkpoint.context - new
            tokens = tuple(self.tok_encode(text)) or (self.prefix_token_id,)
            self.cut += len(tokens) > room
            prompts[number] = tokens[-room:]
            groups.setdefault((len(prompts[number]), new, stops), []).append(number)
        with tqdm(total=len(requests), desc="generating", file=self.progress, disable=self.progress is None) as bar:
            for (length, new, stops), numbers in sorted(groups.items(), reverse=True):
                rows = max(1, self.batch_tokens // (length + new))
                for start in range(0, len(numbers), rows):
                    batch = numbers[start : start + rows]
                    texts = self._continue([prompts[number] for number in batch], new, stops)
                    found.update(zip(batch, texts, strict=True))
                    bar.update(len(batch))
        return [found[number] for number in range(len(requests))]

    def _score(self, requests: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        with tqdm(desc="scoring", unit=" windows", file=self.progress, disable=self.progress is None) as bar:
            found = log_likelihoods(
                self.checkpoint,
                requests,
                self.checkpoint.context,
                self.batch_tokens,
                self.checkpoint.device,
                bar.update,
            )
        return [(likelihood.nats, likelihood.greedy) for likelihood in found]

    def _generation(self, options: dict) -> tuple[int, tuple[str, ...]]:
        """The number of new tokens and the stop strings."""
        if options.get("do_sample") or options.get("temperature"):
            raise UsageError(
                "the model `moepp` decodes greedily; a task that samples (do_sample, temperature) cannot run"
            )
        until = options.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        new = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        return max(1, min(new, self.checkpoint.context // 2)), stops

    @torch.inference_mode()
    def _continue(self, prompts: Sequence[Tokens], new: int, stops: tuple[str, ...]) -> list[str]:
        """Continues prompts of one length, with a key-value cache, until all rows have ended."""
        model, device = self.checkpoint.model, self.checkpoint.device
        caches = self.checkpoint.caches()
        step_BS = torch.tensor(prompts, device=device)
        ids: list[list[int]] = [[] for _ in prompts]
        texts: list[str | None] = [None] * len(prompts)
        for _ in range(new):
            with self.checkpoint.autocast():
                step_BS = model(step_BS, caches).logits[:, -1].argmax(-1, keepdim=True)
            for row, token in enumerate(step_BS[:, 0].tolist()):
                if texts[row] is None:
                    texts[row] = self._ended(ids[row], token, stops)
            if None not in texts:
                break
        return [self._tokenizer.decode(ids[row]) if text is None else text for row, text in enumerate(texts)]

    def _ended(self, ids: list[int], token: int, stops: tuple[str, ...]) -> str | None:
        """Adds a token to a row; its text once that has ended."""
        if token == self.eot_token_id:
            return self._tokenizer.decode(ids)
        ids.append(token)
        text = self._tokenizer.decode(ids)
        places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else None
