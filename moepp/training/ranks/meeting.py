"""One attempt at a run among several that use one store: torchrun keeps it for as long as it runs, and in it the
addresses of ranks that are dead by now.

Each node's agent counts for itself how often its ranks were started again (TORCHELASTIC_RESTART_COUNT), and the counts
differ: an agent whose rank died counts a restart, one that starts its ranks again for another's sake does not. So the
ranks agree on rank 0's count and a word that is new. All ranks of the attempt before have ended when the first of the
next begins.
"""

import secrets
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

SECONDS_BETWEEN_LOOKS = 0.05


def name_of_attempt(store: "Store", rank: int, world_size: int, restarts: str, timeout_s: float) -> str:
    """`restarts` of rank 0, and a word: the same in every rank, and in no attempt before; all must call it. Each rank
    asks with a word of its own, which rank 0 of the same attempt alone can answer.

    Raises torch.distributed.DistStoreError when not all ranks have come within `timeout_s`.
    """
    word = secrets.token_hex(8)
    if rank == 0:
        name = f"{restarts}/{word}"
        if world_size > 1:
            _answer(store, name, world_size, timeout_s)
        return name
    store.set(f"asks/{rank}", word)
    name = store.get(f"answer/{word}").decode()
    store.add(f"{name}/arrived", 1)
    return name


def _answer(store: "Store", name: str, world_size: int, timeout_s: float) -> None:
    """Until every other rank has the name: what a rank seems to ask may be left from an attempt before."""
    from torch.distributed import DistStoreError

    deadline = time.monotonic() + timeout_s
    while (arrived := store.add(f"{name}/arrived", 0)) < world_size - 1:
        if time.monotonic() > deadline:
            raise DistStoreError(f"{arrived + 1} of {world_size} ranks have come within {timeout_s:g} s")
        asking = (key for rank in range(1, world_size) if store.check([key := f"asks/{rank}"]))
        for word in [store.get(key).decode() for key in asking]:
            store.set(f"answer/{word}", name)
        time.sleep(SECONDS_BETWEEN_LOOKS)
