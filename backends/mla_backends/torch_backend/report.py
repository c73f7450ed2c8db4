"""The environment report of a `TorchBackend`: what a number on that device depended on."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

from mla_backends.errors import describe
from mla_backends.monitor import Monitor


def report(parts: Mapping[str, Callable[[], Mapping[str, str]]]) -> dict[str, str]:
    """Return the facts of all parts. Never raises: a part that fails becomes one fact, under its own name."""
    facts: dict[str, str] = {}
    for name, part in parts.items():
        try:
            facts |= part()
        except Exception as error:  # noqa: BLE001  # vendor stacks raise anything
            facts[name] = f"unknown ({describe(error)})"
    return facts


def set_variables(names: Sequence[str]) -> dict[str, str]:
    """Return those of the environment variables that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def known(properties: Any, name: str) -> int | None:
    """Return a number from the properties of a device; absent and zero mean unknown."""
    value = getattr(properties, name, None)
    return int(value) if value else None


def versions(modules: Sequence[str], distributions: Sequence[str]) -> dict[str, str]:
    """Return the versions of modules, which are imported, and of the distributions that are installed."""
    found = {name: str(getattr(importlib.import_module(name), "__version__", "?")) for name in modules}
    for name in distributions:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def sensor_facts(monitor: Monitor | None, at_setup: Mapping[str, str]) -> dict[str, str]:
    """Return the monitor's facts, its readings at setup and its readings now."""
    if monitor is None:
        return {}
    now = monitor.sample()
    return {
        **monitor.facts(),
        **{f"at_setup.{name}": value for name, value in at_setup.items()},
        **{f"now.{name}": value for name, value in now.items()},
    }
