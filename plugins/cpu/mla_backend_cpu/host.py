"""What the host says about its processor and memory. Unknown is None, and no function raises."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path


def processor_name() -> str:
    """Return the model name of the processor."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine() or "unknown CPU"


def last_level_cache() -> int | None:
    """Return the bytes of the largest cache that cpu0 can see."""
    folders = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    sizes = [_size(_read(folder / "size")) for folder in folders]
    return max(sizes, default=0) or None


def cpu_limit() -> int:
    """Return how many CPUs this process may use: its affinity, cut by the cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()  # cgroup v2: "<quota> <period>" in microseconds
    if len(quota) == 2 and quota[0].isdigit():
        allowed = min(allowed, max(1, round(int(quota[0]) / int(quota[1]))))
    return allowed


def memory_total() -> int | None:
    """Return the memory this process may use at most: the machine's, or less under a cgroup limit."""
    return _least(_meminfo("MemTotal"), _cgroup_bytes("memory.max"))


def memory_available() -> int | None:
    """Return the memory that can still be allocated: the lower of MemAvailable and the cgroup's rest."""
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    rest = limit - used if limit is not None and used is not None else None
    return _least(_meminfo("MemAvailable"), rest)


def peak_resident() -> int | None:
    """Return the largest resident set this process has had, in bytes."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _meminfo(key: str) -> int | None:
    match = re.search(rf"^{key}:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def _cgroup_bytes(name: str) -> int | None:
    text = _read(f"/sys/fs/cgroup/{name}").strip()
    return int(text) if text.isdigit() else None


def _size(text: str) -> int:
    match = re.match(r"(\d+)([KMG]?)", text)
    return int(match.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[match.group(2)] if match else 0


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
