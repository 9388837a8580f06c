"""Continues a prompt with a trained run."""

from pathlib import Path

import torch

from moepp.data.tokenizer import encode_text
from moepp.errors import UsageError
from moepp.training.loading import load_run


def continue_text(directory: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """`prompt` and `tokens` more tokens from the model of a finished run; temperature 0 is greedy."""
    run = load_run(directory)
    if not hasattr(run.model, "generate"):
        raise UsageError(f"{directory}: model.name={run.config.model.name} has no method `generate`")
    ids = encode_text(run.tokenizer, prompt)
    if not ids:
        raise UsageError("the prompt holds no token; give some text with --prompt")
    generator = torch.Generator().manual_seed(seed)
    return run.tokenizer.decode(run.model.generate(torch.tensor([ids]), tokens, temperature, generator)[0].tolist())
