"""Interpreted kernels on an emulated device: launches, and graphs that replay them on lengths that change."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
import triton
import triton.language as tl
from interpreted import TUNING
from judged import judged

from mla_backends.torch_backend import TorchBackend
from mla_backends.triton_ops import Launcher, triton_ops

DEVICE = emulated.install("acme", emulated.CARDS["MTT S5000"])


@triton.jit
def add(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at))


class Acme(TorchBackend):
    """The emulated device as a backend that offers the kernels."""

    name, device_type, graph_class, api_version = "acme", "acme", "ACMEGraph", 1

    def ops(self) -> Any:
        return OPS


OPS = triton_ops(TUNING, 4, Launcher())


def draw() -> torch.Tensor:
    return torch.randn(8).to("acme")


def test_a_launch_is_one_kernel_of_the_device() -> None:
    x, y, out = draw(), draw(), torch.empty(8, device="acme")
    before = emulated.STATE.launches
    with emulated.forbidden_waits():
        add[(1,)](x, y, out, N=8)
    assert emulated.STATE.launches == before + 1
    assert torch.equal(out.cpu(), x.cpu() + y.cpu())


def test_a_graph_repeats_a_launch_on_what_its_memory_holds() -> None:
    x, y, out = draw(), draw(), torch.zeros(8, device="acme")
    graph = DEVICE.ACMEGraph()
    with DEVICE.graph(graph):
        add[(1,)](x, y, out, N=8)
    assert not out.cpu().any(), "a captured launch has not run yet"
    x.fill_(3.0)
    graph.replay()
    assert torch.equal(out.cpu(), 3.0 + y.cpu())


def test_tensors_of_two_devices_in_one_launch_are_found() -> None:
    with pytest.raises(emulated.DeviceMix, match="acme:0, cpu"):
        add[(1,)](draw(), torch.zeros(8), draw(), N=8)


@pytest.mark.parametrize(
    "check", ["latent.graph", "latent.graph_lengths", "latent.formula", "expanded.formula"]
)
def test_the_suite_on_the_device(check: str) -> None:
    backend = Acme({"graph": "on"})
    backend.device = backend.setup()
    results = judged(backend, check, wanted=lambda instance: instance.of.startswith("triton"))
    assert [(result.status, result.reason) for result in results] == [("pass", "")]
