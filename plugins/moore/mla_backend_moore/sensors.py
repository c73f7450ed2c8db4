"""Moore Threads' management library, through the distribution mthreads-ml-py (module `pymtml`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from mla_backends.monitor import Address, Dialect, NvmlSampler

LIBRARY = "mthreads-ml-py"
BANDWIDTH = "memory_bandwidth_gb_s"  # name of the fact


class MtmlSampler(NvmlSampler):
    """NVML's names over MTML, and the bandwidth, which NVML does not report."""

    def __init__(self, locate: Callable[[], Address]) -> None:
        super().__init__(Dialect("pymtml"), locate)

    def facts(self) -> Mapping[str, str]:
        found = dict(super().facts())
        with suppress(Exception):  # not every driver knows it
            library, device = self.library, self.device()
            with library.mtmlMemoryContext(device) as memory:
                bandwidth = int(library.mtmlMemoryGetBandwidth(memory))
            if bandwidth:
                found[BANDWIDTH] = str(bandwidth)
        return found
