"""Questions about the cost of launching: kernels one by one, in a graph, and between two events."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.gpu.questions.asking import Asked, device_module, microseconds, question, raised

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mla_backends.api import Backend

NODES = 100  # calls in one graph
BUSY = 2048  # width of the product that keeps the device busy for longer than a launch takes


@question("launch", "How long does a launch take, one by one and as a node of a graph?")
def launch(backend: Backend) -> Asked:
    import torch

    number = torch.zeros(1, device=backend.device)
    a = torch.zeros(16, 64, dtype=torch.bfloat16, device=backend.device)
    b, product = a.new_zeros(64, 64), a.new_zeros(16, 64)
    calls: dict[str, Callable[[], object]] = {
        "add of one element": lambda: number.add_(0),
        "view": lambda: number.view(1, 1),
        "mm 16 x 64 x 64": lambda: torch.mm(a, b, out=product),
    }
    times: dict[str, object] = {f"{name} us": microseconds(backend, call) for name, call in calls.items()}
    replayed = _in_graph(backend, calls["add of one element"])
    times["add as a node of a graph us"] = replayed
    said = f"{times['add of one element us']} us one by one"
    return Asked(f"{said}, in a graph: {replayed}", times)


def _in_graph(backend: Backend, call: Callable[[], object]) -> object:
    """Return the microseconds per call in a graph, or why there is none."""

    def many() -> None:
        for _ in range(NODES):
            call()

    graphs: list[Callable[[], None] | None] = []
    failure = raised(lambda: graphs.append(backend.graph(many)))
    if failure or graphs[0] is None:
        return failure or "this stack has no graphs"
    return round(microseconds(backend, graphs[0], calls=5) / NODES, 3)


@question("event-gap", "How much idle time does the device clock count when an eager forward begins?")
def event_gap(backend: Backend) -> Asked:
    import torch

    module = device_module(backend)
    number = torch.zeros(1, device=backend.device)
    large = torch.zeros(BUSY, BUSY, device=backend.device)

    def between(busy: bool) -> float:
        times = []
        for _ in range(21):
            first, last = (module.Event(enable_timing=True) for _ in range(2))
            backend.synchronize()
            if busy:
                large @ large
            first.record()
            number.add_(0)
            last.record()
            backend.synchronize()
            times.append(first.elapsed_time(last) * 1e3)
        return round(statistics.median(times), 2)

    between(True)
    idle, busy = between(False), between(True)
    return Asked(f"{idle - busy:.1f} us", {"on an idle stream us": idle, "behind other work us": busy})


@question("bmm-strided", "Does bmm write to a transposed output at once, rightly, and faster than a copy?")
def bmm_strided(backend: Backend) -> Asked:
    import torch

    heads, tokens, width, latent = 128, 16, 128, 512
    x = torch.randn(heads, tokens, width).to(backend.device, torch.bfloat16)
    w = torch.randn(heads, width, latent).to(backend.device, torch.bfloat16)
    wanted = torch.bmm(x, w).transpose(0, 1)
    direct, copied = (torch.zeros_like(wanted, memory_format=torch.contiguous_format) for _ in range(2))

    def straight() -> torch.Tensor:
        return torch.bmm(x, w, out=direct.transpose(0, 1))

    refusal = raised(straight)
    if refusal:
        return Asked(f"no: {refusal}")
    equal = bool(torch.equal(direct, wanted))
    times = {
        "direct us": microseconds(backend, straight, calls=20),
        "bmm and copy us": microseconds(
            backend, lambda: copied.copy_(torch.bmm(x, w).transpose(0, 1)), calls=20
        ),
    }
    faster = times["bmm and copy us"] / times["direct us"]
    said = f"{'equal to' if equal else 'other numbers than'} bmm and a copy, {faster:.2f} times as fast"
    return Asked(said, {"equal": equal, **times})
