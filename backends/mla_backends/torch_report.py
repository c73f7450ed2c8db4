"""The environment report of a `TorchBackend`: what a number on that device depended on."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any

from mla_backends.errors import describe

if TYPE_CHECKING:
    from mla_backends.torch_backend import TorchBackend


def report(backend: TorchBackend) -> dict[str, str]:
    """Return every fact that can be had. Never raises: a report must not cost a run."""
    parts = {
        "versions": lambda: _versions(backend.requires, backend.packages),
        "device": lambda: _device(backend),
        "variables": lambda: set_variables((*backend.visibility, *backend.variables)),
        "vendor": backend.vendor_facts,
        "sensors": lambda: _sensors(backend),
    }
    found: dict[str, str] = {}
    for name, part in parts.items():
        try:
            found |= part()
        except Exception as error:  # noqa: BLE001  # vendor stacks raise anything
            found[name] = f"unknown ({describe(error)})"
    return found


def set_variables(names: Sequence[str]) -> dict[str, str]:
    """Return those of the environment variables that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def known(properties: Any, name: str) -> int | None:
    """Return a number among the properties of a device; absent and zero mean unknown."""
    value = getattr(properties, name, None)
    return int(value) if value else None


def _versions(modules: Sequence[str], distributions: Sequence[str]) -> Mapping[str, str]:
    found = {name: str(getattr(importlib.import_module(name), "__version__", "?")) for name in modules}
    for name in distributions:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _device(backend: TorchBackend) -> Mapping[str, str]:
    facts = {
        "device": backend.device,
        "device_count": backend.module.device_count(),
        "capability": backend.capability(),
        "multiprocessors": known(backend.properties(), "multi_processor_count"),
        "graphs": backend.graphs,
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _sensors(backend: TorchBackend) -> Mapping[str, str]:
    """Return the monitor's facts, its readings at setup and its readings now."""
    if backend.monitor is None:
        return {}
    now = backend.monitor.sample()
    return {
        **backend.monitor.facts(),
        **{f"at_setup.{name}": value for name, value in backend.at_setup.items()},
        **{f"now.{name}": value for name, value in now.items()},
    }
