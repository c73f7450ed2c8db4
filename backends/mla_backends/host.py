"""What the host reports about its processor and memory, and how many threads torch uses of it.

Unknown is None, and no function raises.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from mla_backends.api import DeviceInfo, MemoryInfo

_CGROUPS = Path("/sys/fs/cgroup")


def processor_name() -> str:
    """Return the model name of the processor."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine() or "unknown CPU"


def last_level_cache() -> int | None:
    """Return the bytes of the largest cache that cpu0 can see."""
    folders = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    return max((_size(_read(folder / "size")) for folder in folders), default=0) or None


def cpu_limit() -> int:
    """Return how many CPUs this process may use: its affinity, cut by every cgroup quota above it."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups("cpu"):
        quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
        quota = quota or _read(folder / "cpu.cfs_quota_us").strip()
        period = period or _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):
            allowed = min(allowed, max(1, round(int(quota) / int(period))))
    return allowed


def thread_limit(default: int) -> tuple[int, str]:
    """Return how many threads torch should use, given its own default, and which limit that is."""
    limits = [
        (cpu_limit(), "the CPUs it may use"),
        (default, "OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else "torch's default"),
    ]
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if re.fullmatch("[1-9][0-9]{0,5}", per_task):  # Slurm need not bind its tasks to as many
        limits.append((int(per_task), "SLURM_CPUS_PER_TASK"))
    return min(limits, key=lambda limit: limit[0])


def set_threads(options: Mapping[str, str]) -> tuple[int, str]:
    """Set how many threads torch uses: the option `threads`, else the limit. Return it, and its source.

    Without this, torch starts a thread per core of the machine in a container that may use a few.
    """
    import torch

    if "threads" in options:
        threads, source = int(options["threads"]), "the option threads"
    else:
        threads, source = thread_limit(torch.get_num_threads())
    torch.set_num_threads(threads)
    return threads, source


def device_info() -> DeviceInfo:
    """Describe the host as a device."""
    return DeviceInfo(processor_name(), memory_total(), last_level_cache())


def memory() -> MemoryInfo:
    """Return the host's memory, and the most that this process has had."""
    return MemoryInfo(free=memory_available(), total=memory_total(), peak=peak_resident())


def memory_total() -> int | None:
    """Return the most memory this process may use: the machine's, or less under a cgroup limit."""
    return _least(_meminfo("MemTotal"), *(limit for limit, _ in _memory_limits()))


def memory_available() -> int | None:
    """Return what can still be allocated: the lower of MemAvailable and what each cgroup has left."""
    return _least(_meminfo("MemAvailable"), *(limit - used for limit, used in _memory_limits()))


def peak_resident() -> int | None:
    """Return the largest resident set this process has had, in bytes."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) in bytes of every cgroup that limits memory; page cache does not count as used."""
    for folder in _cgroups("memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
        if limit is not None and used is not None:
            yield limit, max(0, used - (int(cached.group(1)) if cached else 0))


def _cgroups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and its parents, version 1 or 2."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers if controllers else _CGROUPS
        folder = root / path.strip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(root))


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _meminfo(key: str) -> int | None:
    match = re.search(rf"^{key}:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _size(text: str) -> int:
    match = re.match(r"(\d+)([KMG]?)", text)
    return int(match.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[match.group(2)] if match else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
