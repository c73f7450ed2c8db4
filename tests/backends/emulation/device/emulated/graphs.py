"""Graphs: a capture notes calls without their effects, a replay repeats them on the same memory."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from emulated.state import STATE
from emulated.tensor import poison
from emulated.trees import change, tensors


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Graph:
    """Captured calls. Only kernels are repeated: decisions the host took are frozen, as on a real device."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # storage -> bytes, copy
        self._made: dict[int, torch.Tensor] = {}

    def before(self, *values: Any) -> None:
        """Keep what a call is about to overwrite."""
        for tensor in tensors(*values):
            address = _address(tensor)
            if address and address not in self._before and address not in self._made:
                view = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[address] = (view, view.clone())

    def after(self, again: Callable[[], Any], given: Any, out: Any) -> None:
        """Note a call, which `again` repeats, and the memory it made."""
        known = {_address(tensor) for tensor in tensors(given)}
        for tensor in tensors(out):
            if _address(tensor) not in known:
                self._made.setdefault(_address(tensor), tensor)

        def repeat() -> None:
            for old, new in zip(tensors(out), tensors(again()), strict=True):
                if _address(old) != _address(new):
                    old.copy_(new)

        self._calls.append(repeat)

    def finish(self) -> None:
        """Undo the effects of the capture: on a real device its kernels have not run."""
        for view, saved in self._before.values():
            view.copy_(saved)
        for tensor in self._made.values():
            poison(tensor)
        self._before.clear()

    def replay(self) -> None:
        """Run the captured calls again; a device that is behind does what it was asked before first."""
        if STATE.behind is not None:
            STATE.behind.catch_up()
        STATE.launches += 1
        for repeat in self._calls:
            repeat()


class Behind:
    """What the host has asked of a device that has done none of it yet."""

    def __init__(self) -> None:
        self._graph = Graph()

    def before(self, *values: Any) -> None:
        self._graph.before(*values)

    def after(self, again: Callable[[], Any], given: Any, out: Any) -> None:
        self._graph.after(again, given, out)

    def catch_up(self) -> None:
        """Do it all, with what host memory holds now."""
        graph, self._graph = self._graph, Graph()
        with STATE.unrecorded():
            graph.finish()
            graph.replay()
        STATE.done += 1


@contextmanager
def behind() -> Iterator[None]:
    """Let the device start on its work only when the host waits for it, and at the end."""
    STATE.behind = Behind()
    try:
        yield
        STATE.behind.catch_up()
    finally:
        STATE.behind = None


def uncounted(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a kernel whose own operations are no launches."""
    before = STATE.launches
    try:
        return function(*args, **kwargs)
    finally:
        STATE.launches = before


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `function` one opaque kernel, which a capture repeats as a whole, as it does a vendor's."""

    @functools.wraps(function)
    def launch(*args: Any, **kwargs: Any) -> Any:
        STATE.launches += 1
        if STATE.recorder is None:
            return uncounted(function, *args, **kwargs)

        def again() -> Any:
            fresh = {key: _fresh(value) for key, value in kwargs.items()}
            return uncounted(function, *map(_fresh, args), **fresh)

        with STATE.unrecorded() as graph:
            given = [_raw(tensor) for tensor in tensors(args, kwargs)]
            graph.before(given)
            out = again()
            raw = change(out, _raw)
            graph.after(lambda: change(again(), _raw), given, raw)
        return out

    return launch


def _raw(tensor: Any) -> torch.Tensor:
    return getattr(tensor, "raw", tensor)


def _fresh(value: Any) -> Any:
    """Return a plan that a call fills in place as it was before; a replay fills it again."""
    return copy.copy(value) if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor) else value


class capture:  # named like torch.cuda.graph, which it stands for
    """Context manager that records into a graph."""

    def __init__(self, graph: Graph, pool: Any = None, stream: Any = None, **options: Any) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        STATE.wait("synchronize before a capture")
        STATE.recording = self._graph

    def __exit__(self, *error: Any) -> None:
        STATE.recording = None
        self._graph.finish()
