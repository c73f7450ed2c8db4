"""The suite a backend must pass: `python -m mla.conformance --backend NAME`, or as a pytest class.

It checks the device, every op that the backend offers over a grid of shapes, and a whole layer. Everything
is compared with float64 on the host, so that no device vouches for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mla.conformance.pytest_suite import BackendConformance

__all__ = ["BackendConformance"]


def __getattr__(name: str) -> object:
    """Import on first use: what only lists checks needs no pytest."""
    if name == "BackendConformance":
        from mla.conformance.pytest_suite import BackendConformance

        return BackendConformance
    raise AttributeError(f"module 'mla.conformance' has no attribute {name!r}")
