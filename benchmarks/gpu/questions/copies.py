"""Questions about copies from the host: what they cost, and whether their source may die at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu.questions.asking import Asked, device_module, microseconds, question, raised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from mla_backends.api import Backend

FILLS, NUMBERS = 10_000, 2048


@question("copies", "What does a copy to the device cost the host, from pageable and from pinned memory?")
def copies(backend: Backend) -> Asked:
    import torch

    device_module(backend)
    times: dict[str, object] = {}
    for name, count in (("4 KiB", 1024), ("590 KiB", 151_040)):
        times |= {f"{how} {name}": us for how, us in _costs(backend, torch.zeros(count, dtype=torch.int32))}
    return Asked(f"4 KiB: {times['pageable 4 KiB']} us pageable, {times['pinned 4 KiB']} us pinned", times)


def _costs(backend: Backend, pageable: torch.Tensor) -> Iterator[tuple[str, object]]:
    """Yield a way to copy and its microseconds, or why it cannot be had."""
    from mla_backends.upload import upload

    device = backend.device
    assert device is not None
    yield "pageable", microseconds(backend, lambda: pageable.to(device, non_blocking=True))
    yield "upload()", microseconds(backend, lambda: upload(pageable, device))
    made: list[torch.Tensor] = []
    refusal = raised(lambda: made.append(pageable.pin_memory()))
    yield "pinned", refusal or microseconds(backend, lambda: made[0].to(device, non_blocking=True))


@question(
    "copies-alive", "Do asynchronous copies arrive whole when their source is freed and used again at once?"
)
def copies_alive(backend: Backend) -> Asked:

    from mla_backends.upload import upload

    device_module(backend)
    device = backend.device
    assert device is not None
    wrong = {
        "plain asynchronous copies": _lost(device, lambda host: host.to(device, non_blocking=True)),
        "upload()": _lost(device, lambda host: upload(host, device)),
    }
    said = ", ".join(f"{count} of {FILLS} wrong by {how}" for how, count in wrong.items())
    return Asked(said, wrong, wrong=bool(wrong["upload()"]))


def _lost(device: torch.device, send: Callable[[torch.Tensor], torch.Tensor], fills: int = FILLS) -> int:
    """Return how many tables arrived with other numbers than were sent."""
    import torch

    bad = torch.zeros((), dtype=torch.int64, device=device)
    for number in range(fills):
        host = torch.full((NUMBERS,), number, dtype=torch.int32)
        there = send(host)
        del host
        torch.full((NUMBERS,), -1, dtype=torch.int32)  # takes the freed memory
        bad += (there != number).any()
    return int(bad)
