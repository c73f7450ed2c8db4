"""The emulated device itself: an emulation that forgives proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch

pytestmark = pytest.mark.only("moore", "nvidia")  # once per way of attaching the device
DEVICE = torch.empty(0, device="musa" if hasattr(torch, "musa") else "cuda").device
OTHER = torch.device(DEVICE.type, 1)


def ones(*shape: int, device: Any = DEVICE) -> torch.Tensor:
    return torch.ones(*shape, device=device)


def index(*values: int) -> torch.Tensor:
    return torch.tensor(values).to(DEVICE)


MIXTURES: dict[str, Callable[[], Any]] = {
    "add": lambda: ones(3) + torch.ones(3),
    "matmul": lambda: ones(3, 3) @ torch.ones(3, 3),
    "a range made without a device": lambda: ones(3) + torch.arange(3),
    "out on the host": lambda: torch.mm(ones(3, 3), ones(3, 3), out=torch.empty(3, 3)),
    "index_select with rows of the host": lambda: ones(3).index_select(0, torch.tensor([1])),
    "index_copy_ from the host": lambda: ones(3).index_copy_(0, index(1), torch.ones(1)),
    "cat": lambda: torch.cat((ones(3), torch.ones(3))),
    "another card": lambda: ones(3) + ones(3, device=OTHER),
}

WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: ones(1).item(),
    "int": lambda: int(index(3)[0]),
    "bool": lambda: bool((ones(3) > 0).all()),
    "tolist": lambda: ones(3).tolist(),
    "cpu": lambda: ones(3).cpu(),
    "to the host, lazily": lambda: ones(3).to("cpu", non_blocking=True),
    "copy_ to the host": lambda: torch.empty(3).copy_(ones(3)),
    "nonzero": lambda: ones(3).nonzero(),
    "a mask as index": lambda: ones(3)[ones(3) > 0],
    "writing a tensor through a mask": lambda: ones(3).__setitem__(ones(3) > 0, ones(3)),
    "masked_select": lambda: ones(3).masked_select(ones(3) > 0),
    "equal": lambda: torch.equal(ones(3), ones(3)),
    "unique": lambda: ones(3).unique(),
    "repeat_interleave of unknown size": lambda: ones(3).repeat_interleave(index(1, 2, 3)),
    "an index of the host": lambda: ones(3)[torch.tensor([0, 2])],
    "a blocking copy from the host": lambda: torch.ones(3).to(DEVICE),
    "a tensor from a list": lambda: torch.tensor([1, 2], device=DEVICE),
    "copy_ from the host": lambda: ones(3).copy_(torch.zeros(3)),
    "synchronize": lambda: getattr(torch, DEVICE.type).synchronize(),
}


def index_of_device() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.long, device=DEVICE)


@pytest.mark.parametrize("case", MIXTURES)
def test_devices_do_not_mix(case: str) -> None:
    with pytest.raises(emulated.DeviceMix):
        MIXTURES[case]()


@pytest.mark.parametrize("case", WAITS)
def test_what_waits_is_noted_and_can_be_forbidden(case: str, state: Any) -> None:
    WAITS[case]()
    assert state.waits
    made = [ones(3), index(1, 2, 3), DEVICE]  # whatever a case makes first is not what is forbidden here
    with pytest.raises(emulated.HostWait), emulated.forbidden_waits():
        WAITS[case]()
    assert made


def test_memory_is_counted_and_freed(state: Any) -> None:
    before = state.allocated
    block = torch.zeros(1000, device=DEVICE)
    view = block[10:]
    assert state.allocated == before + 4000
    del block
    assert state.allocated == before + 4000
    del view
    assert state.allocated == before
    assert state.peak >= before + 4000


def test_a_graph_repeats_kernels_and_not_host_code() -> None:
    module, x, out, calls = getattr(torch, DEVICE.type), ones(3), ones(3), []
    graph = getattr(module, f"{DEVICE.type.upper()}Graph")()
    with module.graph(graph):
        calls.append(1)
        out.copy_((x * 2.0).add_(1.0))
    assert out.cpu().tolist() == [1, 1, 1]  # captured, not run
    x.fill_(5.0)
    graph.replay()
    assert out.cpu().tolist() == [11, 11, 11]
    assert calls == [1]


@pytest.mark.parametrize("case", ["item", "cpu", "a blocking copy from the host", "synchronize"])
def test_a_capture_refuses_to_wait(case: str) -> None:
    module = getattr(torch, DEVICE.type)
    with pytest.raises(RuntimeError, match="stream is capturing"):  # noqa: SIM117
        with module.graph(getattr(module, f"{DEVICE.type.upper()}Graph")()):
            WAITS[case]()
    assert ones(1).item() == 1.0
