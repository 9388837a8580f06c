"""What this CPU multiplies itself."""

from functools import cache
from pathlib import Path

NAMES = {
    "avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "asimd": "NEON",
    "sve": "SVE", "bf16": "BF16",
}  # fmt: skip
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is Arm's


@cache
def _flags() -> frozenset[str]:
    """As Linux prints them; none where it is another system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    words = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(words, []))


def features() -> list[str]:
    """The names of those that matter to matrix products, the narrowest first."""
    return [name for flag, name in NAMES.items() if flag in _flags()]


def multiplies_bfloat16() -> bool:
    """Else a bfloat16 product takes up to 75 times as long as the float32 one. A CPU that nothing is known of does."""
    return not _flags() or any(flag in _flags() for flag in BFLOAT16)
