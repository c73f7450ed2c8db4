"""`TorchBackend` on torch modules that are not there: what it asks them, and what it makes of the answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mla_backends import BackendError, TorchBackend
from mla_backends import upload as uploads
from mla_backends.any_device import AnyDevice
from mla_backends.errors import DeviceUnavailable
from mla_backends.torch_backend import working_dtypes


class Host(TorchBackend):
    """The host as a device, with a torch module of the test's own."""

    name = "host"
    api_version = 1
    device_type = "cpu"

    def __init__(self, **functions: Any) -> None:
        super().__init__()
        whole = {"device_count": lambda: 4, "synchronize": lambda: None, "set_device": lambda index: None}
        self.__dict__["module"] = SimpleNamespace(**whole, **functions)


class OneOfFour(Host):
    """A vendor's plugin that offers fewer devices than torch sees."""

    def device_count(self) -> int | None:
        return 1


class Uncounted(Host):
    def device_count(self) -> int | None:
        return None


def test_the_devices_that_a_plugin_counts_are_those_there_are() -> None:
    """Torch is not asked for more: it would start a device that the plugin hides."""
    assert OneOfFour().setup(0) == torch.device("cpu")
    with pytest.raises(BackendError, match=r"has no device 2: it has 1, numbered from 0\."):
        OneOfFour().setup(2)
    with pytest.raises(DeviceUnavailable, match="tensors are made on cpu"):  # no count: it is tried
        Uncounted().setup(7)


def test_an_index_in_the_name_of_the_device_is_among_those_torch_sees() -> None:
    """The backend `torch` then offers no count of its own."""
    backend = AnyDevice({"device": "cpu:7"})
    assert backend.device_count() is None
    with pytest.raises(BackendError, match=r"has no device 7: it has 1, numbered from 0\."):
        backend.setup()


class Outdated(Host):
    def cure(self, reason: str) -> str:
        return "update the driver" if "driver is too old" in reason else ""

    def prepare_device(self) -> None:
        raise DeviceUnavailable(self.name, self.problem, "ask the vendor", {"driver": "450"})

    problem = "no product comes out right on it (the driver is too old)"


def test_a_device_that_is_refused_while_it_starts_says_the_cure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceUnavailable) as caught:
        Outdated().setup()
    assert (caught.value.reason, caught.value.hint) == (Outdated.problem, "update the driver")
    assert caught.value.evidence == {"driver": "450"}
    monkeypatch.setattr(Outdated, "problem", "it is another vendor's")
    with pytest.raises(DeviceUnavailable, match="it is another vendor's; ask the vendor"):
        Outdated().setup()


def test_memory_is_that_of_the_backends_own_device() -> None:
    """Another thread may have made another device current."""
    current = torch.device("meta", 0)

    def mem_get_info(device: torch.device | None = None) -> tuple[int, int]:
        return (100, 1000) if (device or current).index == 0 else (700, 2000)

    backend = Host(mem_get_info=mem_get_info)
    backend.device = torch.device("meta", 1)
    assert (backend.memory().free, backend.memory().total) == (700, 2000)
    backend = Host(mem_get_info=lambda: (300, 3000))  # a stack whose function takes no device
    assert (backend.memory().free, backend.memory().total) == (300, 3000)


@pytest.mark.parametrize("scale", [1.01, 0.0, float("nan")])
def test_a_dtype_whose_products_are_wrong_is_left_out(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And right ones are exact in every dtype."""
    cpu, right = torch.device("cpu"), torch.Tensor.__matmul__
    assert working_dtypes(cpu, lambda: None) == ((torch.bfloat16, torch.float16, torch.float32), {})

    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return right(a, b) * (scale if a.dtype == torch.float16 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    works, left_out = working_dtypes(cpu, lambda: None)
    assert works == (torch.bfloat16, torch.float32)
    assert left_out["float16"].startswith("a sum of 16 products came out as ")


def test_a_module_whose_events_take_no_time_has_no_device_clock() -> None:
    """`torch.cpu` has some, which mark an order."""
    backend = Host(Event=torch.cpu.Event, is_available=lambda: True)
    assert backend.probe().ok
    assert str(backend.setup()) == "cpu"
    assert backend.device_timer() is None
    assert backend.timer().clock == "host"


def test_on_the_cpu_a_table_is_where_it_belongs_and_a_buffer_is_filled_at_once() -> None:
    """What uploads do on a device is in `emulation/inside/check_uploads.py`."""
    table, target = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    assert uploads.upload(table, torch.device("cpu")) is table
    uploads.upload_into(table, target)
    table.zero_()
    assert target.tolist() == [0, 1, 2]
    assert not uploads._RINGS
