"""The device's state around timed passes, as evidence: clocks, power, temperature."""

from __future__ import annotations

from mla_backends.api import Backend
from mla_backends.errors import describe


def read_sensors(backend: Backend, when: str) -> list[dict[str, str]]:
    """Return one reading, labelled with `when`; none if the backend has no sensors. Never raises."""
    try:
        found = {str(name): str(value) for name, value in backend.sensors().items()}
    except Exception as error:  # noqa: BLE001  # a sensor must not cost a run
        found = {"sensors": f"unknown ({describe(error)})"}
    return [{"when": when, **found}] if found else []
