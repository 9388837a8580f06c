"""Expert loads with planted properties."""

import numpy as np

from moepp.routing.loads import ExpertLoad

KINDS = ("ffn", "ffn", "constant", "copy", "zero")


def synthetic_load(
    ffn_KL: np.ndarray, zero_K: np.ndarray, bits_K: np.ndarray, examples: int = 60, tokens: int = 40, seed: int = 0
) -> ExpertLoad:
    """Two choices a token. `ffn_KL` FFN experts per token of task and layer, `zero_K` zero experts per token, `bits_K`
    bits per byte; the rest goes to constant and copy experts. Examples differ by binomial noise.
    """
    generator = np.random.default_rng(seed)
    tasks, layers = ffn_KL.shape
    shape = (examples, layers)
    chosen, nats = [], []
    for ffn_L, zero, bits in zip(ffn_KL, zero_K, bits_K, strict=True):
        ffn = generator.binomial(2 * tokens, ffn_L / 2, shape)
        nothing = np.minimum(generator.binomial(2 * tokens, zero / 2, shape), 2 * tokens - ffn)
        first = generator.binomial(ffn, 0.5)
        rest = 2 * tokens - ffn - nothing
        chosen.append(np.stack([first, ffn - first, rest // 2, rest - rest // 2, nothing], axis=-1))
        nats.append(generator.normal(bits, 0.3, examples) * np.log(2) * 100)
    names = tuple(f"task {k}" for k in range(tasks) for _ in range(examples))
    return ExpertLoad(
        KINDS,
        np.concatenate(chosen).astype(np.int32),
        np.full(tasks * examples, tokens),
        np.concatenate(nats),
        np.full(tasks * examples, 100),
        names,
        names,
        names,
    )
