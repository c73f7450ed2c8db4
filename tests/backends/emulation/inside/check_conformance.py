"""The conformance suite on the emulated device, in the default dtype."""

from __future__ import annotations

import pytest
from judged import faults, judged

import mla
from mla.conformance.trial import Drawing
from mla_backends.api import OPS, Backend


def run_suite(backend: Backend, *only: str) -> set[str]:
    """Return the checks that pass, none failing."""
    results = judged(backend, *only)
    assert faults(results) == []
    return {result.check for result in results if result.status == "pass"}


def test_the_device_conforms(name: str) -> None:
    passed = run_suite(mla.load_backend(name), "device")
    assert {"device.probe", "device.synchronize", "device.memory", "device.environment"} <= passed
    assert ("device.graph" in passed) == (name != "iluvatar")


DRAWS = 20  # of each op: states and memory that are used again
# What devices differ in: where tensors lie, how they are copied and indexed, streams and graphs. The rest is
# arithmetic, which the emulated device leaves to the host.
WHERE_DEVICES_DIFFER = (
    *("layer.decode", "layer.two_layers", "layer.no_tokens", "layer.graph*"),
    *("latent.formula", "latent.graph*", "expanded.formula"),
    *("write_latent.slots", "sparse_latent_attention.graph*"),
)


@pytest.mark.only("moore")  # once will do: all of these run the same code on the same emulation
def test_the_reference_and_the_layer_conform(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = mla.load_backend(name)
    monkeypatch.setattr(backend, "ops", dict)  # a quick look has the reference where it is alone
    passed = run_suite(backend, *WHERE_DEVICES_DIFFER)
    assert {"layer.decode", "layer.graph", "latent.formula", "write_latent.slots"} <= passed
    drawn = judged(backend, "*.drawn", drawing=Drawing(DRAWS))
    assert [(result.status, result.failures) for result in drawn] == [("incomplete", [])] * len(OPS)
