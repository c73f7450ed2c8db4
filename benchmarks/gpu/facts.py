#!/usr/bin/env python3
"""Print what a backend's device is, as one line of JSON. Its own process: the campaign holds no device.

python benchmarks/gpu/facts.py nvidia
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import msgspec

from benchmarks.gpu.steps import Machine
from mla.command import console, environment
from mla_backends.api import Backend
from mla_backends.errors import BackendError, describe, one_line

# Distributions whose versions decide what runs and how fast.
INSTALLED = re.compile(
    r"torch|triton|nvidia|cuda|flash|mla|mate|ixformer|tokenspeed|ninja|tvm|cutlass|musa|maca"
)


def machine(name: str) -> Machine:
    """Return what is known of the device, or why the backend is not usable."""
    from mla import load_backend

    try:
        backend = load_backend(name)
        card, options = backend.device_info().name, tuple(backend.known_options())
        return Machine(name, card, True, "", offered(backend), facts(backend), options)
    except BackendError as error:
        return Machine(name, reason=one_line(str(error)), facts=installed())
    except Exception as error:  # noqa: BLE001  # a broken stack raises anything, and must not end the campaign
        return Machine(name, reason=one_line(describe(error)), facts=installed())


def offered(backend: Backend) -> dict[str, list[str]]:
    """Return op -> names of the backend's implementations, best first."""
    found: dict[str, list[str]] = {}
    for name, op in backend.ops().items():
        found.setdefault(op.contract.partition("/")[0], []).append(name)
    return found


def facts(backend: Backend) -> dict[str, str]:
    """Return the environment of a run, the device's memory and what is installed."""
    info = backend.device_info()
    more = {"device": info.name, "memory_bytes": str(info.memory_bytes), "cache_bytes": str(info.cache_bytes)}
    if commit := environment.git_commit():
        more["git_commit"] = commit
    return {**more, **environment.environment(backend), **installed()}


def installed() -> dict[str, str]:
    """Return the versions of distributions that matter."""
    every = {str(one.metadata["Name"]).lower(): one.version for one in metadata.distributions()}
    return {f"installed.{name}": every[name] for name in sorted(every) if INSTALLED.search(name)}


if __name__ == "__main__":
    console.out(msgspec.json.encode(machine(sys.argv[1])).decode() + "\n")
