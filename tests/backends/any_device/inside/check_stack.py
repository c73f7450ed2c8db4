"""Stacks that lack any part of what torch.cuda has, or have it broken, on an emulated device."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import emulated
import pytest
import torch
import torch_acme
from judged import faults, judged

import mla
from mla_backends import BackendError, BackendOptionError, any_device
from mla_backends.api import MemoryInfo
from mla_backends.registry import create

# What nothing can be measured without. All else is optional.
VITAL = ("is_available", "device_count", "synchronize", "set_device")


def broken(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("this build has no such thing\nsee the log")


# What a stack may have in the place of something that works.
FAULTS: dict[str, Any] = {
    "raises": broken,
    "None": lambda *arguments, **options: None,
    "text": lambda *arguments, **options: "?",
    "negative": lambda *arguments, **options: -1,
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(any_device, "SLEEP_MS", 2.0)
    emulated.STATE.current = 0


def opened(**options: str) -> Any:
    return mla.load_backend("torch", options={"device": "acme", **options})


def backend_or_sentence(**options: str) -> Any:
    try:
        return opened(**options)
    except BackendError as error:
        return str(error)


def use(backend: Any) -> None:
    """Ask for everything that a run asks for; what comes back must be what the contract says."""
    assert backend.dtypes()
    backend.timer().start()
    assert backend.timer().clock == "host"
    clock = backend.device_timer()
    if clock is not None:
        clock.start()
        assert clock.stop() >= 0
    info, memory = backend.device_info(), backend.memory()
    assert info.name
    assert info.memory_bytes is None or info.memory_bytes > 0
    assert isinstance(memory, MemoryInfo)
    assert all(value is None or value >= 0 for value in vars(memory).values())
    assert memory.total != 0
    backend.empty_cache()
    assert all(isinstance(text, str) for item in backend.environment().items() for text in item)
    assert all(isinstance(remark, str) for remark in backend.remarks())
    assert backend.device_count() is None or backend.device_count() > 0
    assert (torch.ones(2, device=backend.device) + 1).cpu().tolist() == [2.0, 2.0]


@pytest.mark.parametrize("seed", range(60))
def test_any_stack_runs_or_says_why(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what a stack has is missing or broken; that refuses the device only where it is vital."""
    chance = random.Random(seed)
    spoilt: dict[str, str] = {}
    for name in sorted(name for name in vars(torch.acme) if not name.startswith("_")):
        if chance.random() < (0.1 if name in VITAL else 0.5):
            fault = chance.choice(["missing", *FAULTS])
            spoilt[name] = fault
            if fault == "missing":
                monkeypatch.delattr(torch.acme, name)
            else:
                monkeypatch.setattr(torch.acme, name, FAULTS[fault])
    opened_or_said = backend_or_sentence(graph=chance.choice(["on", "off"]))
    if isinstance(opened_or_said, str):
        assert opened_or_said.endswith(".")
        assert "\n" not in opened_or_said
        assert opened_or_said.startswith("-O graph=on: ") or set(spoilt) & set(VITAL), (
            spoilt,
            opened_or_said,
        )
    else:
        assert opened_or_said.device == torch.device("acme:0")
        use(opened_or_said)


@pytest.mark.parametrize("name", sorted(name for name in vars(torch.acme) if not name.startswith("_")))
def test_one_missing_part_is_named_or_not_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.acme, name)
    if name == "synchronize":
        with pytest.raises(BackendError, match=r"torch\.acme has no synchronize\(\), so a clock would stop"):
            opened()
    else:
        use(opened())


def test_the_only_accelerator_is_taken_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    remarks = mla.load_backend("torch").remarks()
    assert remarks == ["device acme:0: the accelerator that torch reports (-O device= chooses)"]
    assert opened().remarks() == []
    monkeypatch.delattr(torch.acme, "is_available")  # as torch.mps in torch 2.4
    assert mla.load_backend("torch").device == torch.device("acme:0")
    monkeypatch.setattr(torch.mtia, "is_available", lambda: True)
    with pytest.raises(BackendError, match=r"reports several accelerators \(acme, mtia\); choose a device"):
        mla.load_backend("torch")


def test_an_index_is_the_users_or_the_launchers() -> None:
    def second(count: int | None) -> int | None:
        return None if count is None else 1

    assert mla.load_backend("torch", second, options={"device": "acme"}).device == torch.device("acme:1")
    assert mla.load_backend("torch", second, options={"device": "acme:0"}).device == torch.device("acme:0")
    assert mla.load_backend("torch", 1, options={"device": "acme:1"}).device == torch.device("acme:1")
    with pytest.raises(BackendOptionError, match="device=acme:0 and --device 1 name different devices"):
        mla.load_backend("torch", 1, options={"device": "acme:0"})
    with pytest.raises(BackendError, match="has no device 2: it has 2, numbered from 0"):
        opened(device="acme:2")


def test_an_index_that_cannot_be_made_current_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(torch.acme, "set_device")
        with pytest.raises(BackendError, match=r"no set_device\(\), so device 1 cannot be made current"):
            opened(device="acme:1")
        assert opened(device="acme:0").device == torch.device("acme:0")
    monkeypatch.setattr(torch.acme, "set_device", lambda index: None)
    with pytest.raises(BackendError, match=r"after torch\.acme\.set_device\(1\), tensors are made on acme:0"):
        opened(device="acme:1")


def test_no_device_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.acme, "device_count", lambda: 0)
    with pytest.raises(BackendError, match="torch sees 0 devices; check that this torch"):
        opened()
    monkeypatch.setattr(torch.acme, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"torch\.acme\.is_available\(\) is False; check that this torch"):
        opened()


@pytest.mark.parametrize("place", ["probe", "setup"])
def test_a_driver_that_is_too_old_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def outdated(*arguments: Any) -> Any:
        raise RuntimeError("The driver on your system is too old (found version 11040). Update it")

    monkeypatch.setattr(torch.acme, "is_available" if place == "probe" else "set_device", outdated)
    with pytest.raises(BackendError, match=r"too old .*; update the driver, or install a torch older than "):
        opened(device="acme:0")


def test_float32_is_multiplied_in_float32_and_that_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every library of torch.backends with a switch, one that cannot be read, and one without any."""

    class Mixed:
        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("mix of the legacy and new APIs")

    dnn = SimpleNamespace(allow_tf32=True)
    for name, library in (("acmednn", dnn), ("mixed", Mixed()), ("plain", SimpleNamespace())):
        monkeypatch.setattr(torch.backends, name, library, raising=False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    torch.set_float32_matmul_precision("high")
    facts = opened(threads="1").environment()
    assert dnn.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == facts["float32_matmul_precision"] == "highest"
    assert facts["acmednn.allow_tf32"] == facts["cudnn.allow_tf32"] == "False"
    assert facts["mixed.allow_tf32"].startswith("unreadable (RuntimeError: mix of")
    assert "plain.allow_tf32" not in facts
    assert facts["NVIDIA_TF32_OVERRIDE"] == "1"
    assert facts["host_threads"] == "1, the option threads"


def test_dtypes_whose_products_fail_or_lie_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    card = emulated.Card("Acme Old", (1, 0), 8, products=("float16", "float32"))
    monkeypatch.setattr(emulated.STATE, "card", card)
    backend = opened()
    assert backend.dtypes() == (torch.float16, torch.float32)
    assert "not implemented for bfloat16" in backend.environment()["dtypes.bfloat16"]
    on_host = emulated.tensor._on_host

    def wrong(func: Any, *call: Any, **words: Any) -> Any:
        out = on_host(func, *call, **words)
        return out.mul_(1.05) if func is torch.ops.aten.mm.default and out.dtype == torch.float16 else out

    with monkeypatch.context() as patch:
        patch.setattr(emulated.tensor, "_on_host", wrong)
        backend = opened()
        assert backend.dtypes() == (torch.float32,)
        assert "a sum of 16 products came out as " in backend.environment()["dtypes.float16"]
    monkeypatch.setenv("ACME_REFUSES", "aten::mm")
    with pytest.raises(
        BackendError, match=r"no product comes out right on it .*Could not run 'aten::mm' with arguments"
    ):
        opened()


def test_a_graph_is_captured_only_where_it_is_asked_for() -> None:
    backend, total = opened(graph="on"), torch.zeros(1, device="acme")
    replay = backend.graph(lambda: total.add_(1))
    before = total.cpu().item()
    replay()
    assert total.cpu().item() == before + 1
    assert opened().graph(lambda: total.add_(1)) is None


def test_a_stack_without_part_of_a_capture_has_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.acme, "current_stream")
    lacks = r"-O graph=on: torch\.acme lacks what a capture needs \(current_stream\): leave the option out"
    with pytest.raises(BackendOptionError, match=lacks):
        opened(graph="on")
    assert opened().environment()["graphs"] == "none"


def test_a_stack_like_torch_cuda_is_described() -> None:
    backend, total = opened(), 8 << 30
    info, memory = backend.device_info(), backend.memory()
    assert (info.name, info.memory_bytes, info.cache_bytes) == ("Acme One (acme)", total, None)
    assert memory.total == total
    assert memory.free == total - memory.allocated
    assert memory.peak >= memory.allocated
    assert backend.environment()["capability"] == "1.0"


def with_module(backend: Any, module: Any) -> Any:
    """Let a backend that is set up ask another module."""
    backend.__dict__["module"] = module
    return backend


def test_memory_of_a_stack_with_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(
        current_allocated_memory=lambda: 300,
        driver_allocated_memory=lambda: 400,
        recommended_max_memory=lambda: 1000,
    )
    backend = opened()
    memory = with_module(backend, module).memory()
    assert memory == MemoryInfo(free=600, total=1000, allocated=300, peak=None)


def test_the_device_conforms() -> None:
    results = judged(opened(), "device", reopen=lambda more: create("torch", more))
    assert faults(results) == []
    assert {result.check for result in results if result.status == "refused"} == {"device.graph"}


def test_the_package_is_what_brought_the_device() -> None:
    assert torch_acme.__version__ == opened().environment()["torch_acme"]


def events(elapsed: Callable[[float], float], **moments: Any) -> Any:
    """Return a module whose events say what `elapsed` makes of the milliseconds that passed."""

    class Event(emulated.functions.Event):  # type: ignore[misc]
        def elapsed_time(self, other: Any) -> float:
            return elapsed(super().elapsed_time(other))

    return SimpleNamespace(Event=Event, **moments)


@pytest.mark.parametrize(
    ("elapsed", "problem"),
    [
        (lambda ms: ms, ""),
        (lambda ms: 1.02 * ms, ""),
        (lambda ms: 0.0, r"called a pause of [\d.]+ ms 0 ms$"),
        (lambda ms: ms / 1e3, "called a pause of"),  # seconds
        (lambda ms: ms * 1e3, "called a pause of"),  # microseconds
        (lambda ms: -ms, "called a pause of"),
        (lambda ms: float("nan"), "called a pause of"),
        (lambda ms: None, "cannot time: TypeError"),
        (broken, "cannot time: AssertionError: this build has no such thing$"),
    ],
)
def test_events_that_are_no_clock_are_found_out(
    elapsed: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(any_device, "SLEEP_MS", 20.0)
    said = any_device.clock_problem(events(elapsed), "acme", lambda: None)
    assert re.search(rf"^torch\.acme\.Event {problem}" if problem else "^$", said), said
