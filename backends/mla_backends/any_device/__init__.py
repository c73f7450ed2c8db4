"""The backend `torch`: any device that has a torch module, without a plugin."""

from __future__ import annotations

from collections.abc import Mapping

from mla_backends.any_device.backend import AnyDevice
from mla_backends.hookspecs import hookimpl

__all__ = ["AnyDevice", "mla_backend"]


@hookimpl
def mla_backend(options: Mapping[str, str]) -> AnyDevice:
    """Return the backend for the device that `-O device` names."""
    return AnyDevice(options)
