"""What training takes of its machine; MLflow shows `system/*` on a page of their own."""

import os
import time
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")  # Linux: sizes in pages, the second of them resident


class SystemMeter:
    """Reads the load of this process and of its GPU.

    It is read where losses are logged, so that no thread of its own competes with training and a resumed run
    writes the same steps.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._has_utilization = device.type == "cuda" and _has_utilization(device)
        self._wall, self._busy = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """`system/cpu_percent` since the last reading (100 is one core; data-loading processes not counted),
        `system/memory_gib` resident, and on a GPU `system/gpu_memory_gib`, everyone's, and where NVML answers
        `system/gpu_percent`, over its last sampling period of up to a second.
        """
        wall, busy = time.perf_counter(), time.process_time()
        found = {"system/cpu_percent": 100 * (busy - self._busy) / (wall - self._wall)}
        self._wall, self._busy = wall, busy
        if STATM.exists():
            found["system/memory_gib"] = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            found["system/gpu_memory_gib"] = (total - free) / 2**30
        if self._has_utilization:
            found["system/gpu_percent"] = torch.cuda.utilization(self._device)
        return found


def _has_utilization(device: torch.device) -> bool:
    """Whether torch finds NVML's Python binding, which is no dependency here, and the device answers."""
    try:
        torch.cuda.utilization(device)
    except Exception:  # NVML's errors share no narrower base
        return False
    return True
