"""Continues a prompt with a trained run."""

from pathlib import Path

import torch

from moepp.data.prepare import prepare
from moepp.errors import UsageError
from moepp.training.weights import load_decoder


def continue_text(directory: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """`prompt` and `tokens` more tokens from the model of a finished run; temperature 0 is greedy."""
    from tokenizers import Tokenizer

    model, config = load_decoder(directory)
    tokenizer = Tokenizer.from_file(str(prepare(config.data, progress=False).path / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise UsageError("the prompt holds no token; give some text with --prompt")
    generator = torch.Generator().manual_seed(seed)
    return tokenizer.decode(model.generate(torch.tensor([ids]), tokens, temperature, generator)[0].tolist())
