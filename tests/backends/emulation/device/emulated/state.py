"""What an emulated device knows about itself and about what was done to it.

Imports no torch: torch may import this while it is still being imported itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from emulated.cards import Card

if TYPE_CHECKING:
    import torch


class DeviceMix(RuntimeError):
    """Tensors of different devices met in one operation."""


class HostWait(RuntimeError):
    """The host would have waited for the device where that is forbidden."""


class Block:
    """A piece of device memory; it counts while any tensor uses it."""

    def __init__(self, state: State, size: int) -> None:
        self._state, self._size = state, size
        state.allocated += size
        state.peak = max(state.peak, state.allocated)

    def __del__(self) -> None:
        self._state.allocated -= self._size


@dataclass
class State:
    """One kind of emulated device. There is one per process, like the real thing."""

    name: str = ""
    card: Card | None = None
    count: int = 0
    current: int = 0
    waits: list[str] = field(default_factory=list)  # every operation that would have blocked the host
    uploads: int = 0  # copies from the host that need not block it
    launches: int = 0  # kernels and copies; views and allocations are none
    forbidden: bool = False
    allowed: tuple[str, ...] = ()  # waits that are noted and never forbidden
    allocated: int = 0
    peak: int = 0
    recording: Any = None  # the graph that is being captured
    behind: Any = None  # what the device has not done yet, inside `behind()`
    done: int = 0  # how often the device has done all it was asked to
    pins: bool = True  # whether the stack has pinned memory
    _blocks: weakref.WeakValueDictionary[int, Block] = field(default_factory=weakref.WeakValueDictionary)

    def wait(self, what: str) -> None:
        """Note that the host waits for the device."""
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        self.waits.append(what)
        if self.forbidden and what not in self.allowed:
            raise HostWait(what)
        if self.behind is not None:
            self.behind.catch_up()

    def upload(self, pinned: bool) -> None:
        """Note a copy from the host that does not make it wait."""
        if self.recording is not None and not pinned:
            raise RuntimeError("a copy from the host needs pinned memory when stream is capturing")
        self.uploads += 1

    @property
    def recorder(self) -> Any:
        """What notes the calls of now: a graph, or a device that is behind; None where they just run."""
        return self.recording if self.recording is not None else self.behind

    @contextmanager
    def unrecorded(self) -> Iterator[Any]:
        """Let calls run without being noted one by one; gives the recorder."""
        recorder, kept = self.recorder, (self.recording, self.behind)
        self.recording = self.behind = None
        try:
            yield recorder
        finally:
            self.recording, self.behind = kept

    def block(self, raw: torch.Tensor) -> Block:
        """Return the memory that a host tensor stands for; its views share it."""
        storage = raw.untyped_storage()
        known_block = self._blocks.get(storage.data_ptr())
        if known_block is None:
            known_block = Block(self, storage.nbytes())
            if storage.data_ptr():
                self._blocks[storage.data_ptr()] = known_block
        return known_block


STATE = State()


@contextmanager
def forbidden_waits(allowed: tuple[str, ...] = ()) -> Iterator[State]:
    """Raise `HostWait` for whatever would make the host wait for the device, but for what is `allowed`."""
    STATE.waits.clear()
    STATE.uploads, STATE.forbidden, STATE.allowed = 0, True, allowed
    try:
        yield STATE
    finally:
        STATE.forbidden = False
