"""The conformance suite on the emulated device, in the default dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mla
from mla.conformance.selection import Xfails
from mla.conformance.suite import carry_out, instances
from mla.conformance.trial import BackendUnderTest


def run_suite(name: str, *only: str) -> set[str]:
    """Return the checks that pass, none failing."""
    subject = BackendUnderTest(mla.load_backend(name), name, quick=True)
    found: list[Any] = [
        carry_out(one, subject, Xfails({})) for one in instances(subject, (torch.bfloat16,), only)
    ]
    assert not [(one.id, one.reason) for one in found if one.status not in ("pass", "refused")]
    return {one.check for one in found if one.status == "pass"}


def test_the_device_conforms(name: str) -> None:
    passed = run_suite(name, "device")
    assert {"device.probe", "device.synchronize", "device.memory_grows", "device.environment"} <= passed
    assert ("device.graph" in passed) == (name != "iluvatar")


# What devices differ in: where tensors lie, how they are copied and indexed, streams and graphs. The rest is
# arithmetic, which the emulated device leaves to the host.
WHERE_DEVICES_DIFFER = (
    *("layer.decode", "layer.untouched", "layer.two_layers", "layer.no_tokens", "layer.graph*"),
    *("latent.decode", "latent.tables", "latent.kept", "latent.refilled", "latent.graph*"),
    *("expanded.prefill", "expanded.kept", "*.earlier_outputs", "*.call_before", "write_latent.slots"),
)


@pytest.mark.only("moore")  # once will do: all of these run the same code on the same emulation
def test_the_reference_and_the_layer_conform(name: str) -> None:
    passed = run_suite(name, *WHERE_DEVICES_DIFFER)
    assert len(passed) > 25
    assert {"layer.decode", "layer.graph", "latent.tables", "expanded.prefill"} <= passed
