"""Host tables arrive as they were when they were sent, however late the device reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch

import mla
from mla.weights import random_state_dict
from mla_backends import upload as uploads
from mla_backends.upload import upload, upload_into

pytestmark = pytest.mark.only("moore", "nvidia")  # once per way of attaching the device
HISTORY = [9, 40, 1]


@pytest.fixture(autouse=True)
def fresh_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without slots from other checks."""
    monkeypatch.setattr(uploads, "_RINGS", {})


@pytest.fixture
def device(backend: Any) -> torch.device:
    assert backend.device is not None
    return backend.device


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Return the sizes of the slots that are made."""
    made: list[int] = []
    memory = uploads._host_memory
    monkeypatch.setattr(uploads, "_host_memory", lambda size: made.append(size) or memory(size))
    return made


# ------------------------------------------------------------------------------------------- the emulation


def test_a_device_that_is_behind_reads_host_memory_late(device: torch.device) -> None:
    kept, freed = torch.ones(3), torch.ones(3)
    with emulated.behind():
        copies = [kept.to(device, non_blocking=True), freed.to(device, non_blocking=True)]
        sums = [copy + 1.0 for copy in copies]
        kept.fill_(5.0)
        del freed
    assert [total.cpu().tolist() for total in sums] == [[6.0] * 3, [1.0] * 3]


# ------------------------------------------------------------------------------------------------ one copy


def old_upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host.to(device, non_blocking=True)


def old_upload_into(host: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(host, non_blocking=True)


def sent(device: torch.device, count: int, send: Any = upload) -> list[Any]:
    """Upload tables of several sizes and dtypes from memory that is used again, and return them."""
    uploads, memory = [], torch.zeros(5000, dtype=torch.int64)
    for i in range(count):
        table = memory[: 1 + 700 * (i % 8)].fill_(i)
        uploads.append(send(table if i % 2 else table.int(), device))
    return uploads


def test_every_table_arrives_as_it_was_sent(device: torch.device) -> None:
    with emulated.behind(), emulated.forbidden_waits(allowed=("synchronize",)):
        uploads = sent(device, 40)
        getattr(torch, device.type).synchronize()  # the first slots are free again
        uploads += sent(device, 40)
    values = [upload.cpu().unique().tolist() for upload in uploads]
    assert values == [[i % 40] for i in range(80)]
    assert [upload.dtype for upload in uploads[:2]] == [torch.int32, torch.int64]
    with emulated.behind():
        uploads = sent(device, 40, old_upload)
    assert [upload.cpu().unique().tolist() for upload in uploads] != values[:40]


def test_memory_is_used_again_once_the_device_has_read_it(device: torch.device, slots: list[int]) -> None:
    with emulated.behind():
        sent(device, 24)
        getattr(torch, device.type).synchronize()
        before = len(slots)
        sent(device, 24)
    for _ in range(5):
        sent(device, 24)
    assert len(slots) == before == 24
    assert set(slots) <= {1 << n for n in range(12, 17)}


def test_a_device_that_keeps_up_needs_a_slot_per_size(device: torch.device, slots: list[int]) -> None:
    for _ in range(3):
        sent(device, 24)
    assert len(slots) == len(set(slots))


def test_without_pinned_memory_copies_are_as_safe(device: torch.device, state: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(state, "pins", False)
    with emulated.behind(), emulated.forbidden_waits():
        uploads = sent(device, 40)
    assert [upload.cpu().unique().tolist() for upload in uploads] == [[i] for i in range(40)]


@pytest.mark.parametrize("stack", ["no events", "events that cannot be asked", "events that raise"])
def test_without_events_the_host_waits(
    stack: str, device: torch.device, module: Any, monkeypatch: pytest.MonkeyPatch, state: Any
) -> None:
    if stack == "no events":
        monkeypatch.delattr(module, "Event")
    elif stack == "events that cannot be asked":
        monkeypatch.delattr(module.Event, "query")
    else:
        monkeypatch.setattr(module, "Event", lambda **options: torch.empty(-1))
    state.waits.clear()
    with emulated.behind():
        uploads = sent(device, 4)
    assert state.waits == ["a blocking copy from the host"] * 4
    assert [upload.cpu().unique().tolist() for upload in uploads] == [[i] for i in range(4)]


def test_a_captured_copy_keeps_its_memory(device: torch.device, module: Any) -> None:
    graph, out = getattr(module, f"{device.type.upper()}Graph")(), torch.zeros(3, device=device)
    with module.graph(graph):
        upload_into(torch.ones(3), out)
    for _ in range(3):
        out.zero_()
        sent(device, 16)
        graph.replay()
        assert out.cpu().tolist() == [1.0] * 3


def test_a_copy_is_behind_the_event_of_its_own_card(
    module: Any, state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another card may be the current one."""
    streams: list[Any] = []
    record = module.Event.record
    monkeypatch.setattr(
        module.Event, "record", lambda self, *given: streams.extend(given) or record(self, *given)
    )
    monkeypatch.setattr(
        module, "current_stream", lambda device=None: None if device is None else device, raising=True
    )
    other = torch.device("musa" if hasattr(torch, "musa") else "cuda", 1)
    assert upload(torch.ones(2), other).cpu().tolist() == [1.0, 1.0]
    assert streams == [other]


# ------------------------------------------------------------------------------------------- a whole layer


def outputs(config: Any, backend: Any, attention: str, counts: tuple[int, ...], steps: int) -> torch.Tensor:
    """Run a layer over pages that run full on the way, without waiting, and return what it gives."""
    torch.manual_seed(0)
    layer = mla.MLA(config, backend=backend, attention=attention)
    layer.load_state_dict(random_state_dict(config))
    cache = mla.LatentCache(config, max_tokens=2048, page_size=16, device=backend.device, shuffle=0)
    ids = cache.new_sequences(len(counts))
    cache.extend(ids, HISTORY[: len(counts)])
    cache.pages.copy_(torch.randn(cache.pages.shape))
    hidden = torch.randn(steps, sum(counts), config.hidden_size).bfloat16().to(backend.device)
    results = [layer(tensor, cache.extend(ids, counts), cache.pages[0]) for tensor in hidden]
    return torch.stack([result.cpu() for result in results])


CASES = [("absorbed", (1, 1, 1)), ("absorbed", (2, 1, 3)), ("expanded", (2, 1, 3)), ("auto", (30, 1, 5))]


@pytest.mark.only("nvidia")  # a layer copies in the same way wherever the device is attached
@pytest.mark.parametrize(("attention", "counts"), CASES, ids=str)
def test_steps_ahead_of_the_device_are_right(
    attention: str, counts: tuple[int, ...], config: Any, backend: Any
) -> None:
    expected = outputs(config, backend, attention, counts, steps=4)
    with emulated.behind():
        results = outputs(config, backend, attention, counts, steps=4)
    assert expected.isfinite().all()
    assert torch.equal(results, expected)


class Hasty(uploads._Ring):
    """Takes a slot for read as soon as it was sent."""

    def _free(self, size: int) -> Any:
        waiting = self._slots[size]
        return waiting.popleft() if waiting else super()._free(size)


def plain_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was before: copies straight from the caller's memory."""
    monkeypatch.setattr("mla.layer.plan.upload", old_upload)
    monkeypatch.setattr("mla.reference.attention.upload", old_upload)


MUTANTS = {
    "tables": lambda patch: patch.setattr("mla.cache.ragged_batch.upload_into", old_upload_into),
    "indices": plain_upload,
    "slots used again too early": lambda patch: patch.setattr(uploads, "_Ring", Hasty),
}


@pytest.mark.only("nvidia")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_copies_from_memory_that_changes_are_caught(
    mutant: str, config: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTANTS[mutant](monkeypatch)
    assert not all(is_right_behind(config, backend, *case) for case in CASES)


def is_right_behind(config: Any, backend: Any, attention: str, counts: tuple[int, ...]) -> bool:
    expected = outputs(config, backend, attention, counts, steps=4)
    try:
        with emulated.behind():
            return torch.equal(outputs(config, backend, attention, counts, steps=4), expected)
    except IndexError:  # a page or a slot that does not exist
        return False
