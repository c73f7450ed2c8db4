"""`Crew`: the ranks of a run and how they talk apart from the layer's own collectives.

Commands go from rank 0 to all others through gloo, on the host: the device's library carries tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from mla.bench.ranks import link_fit, pulse
from mla.bench.ranks.lead import LeadLayer
from mla.bench.ranks.part import RankLayer
from mla.bench.ranks.pulse import Pulse, RankLost
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.setting import Setting
from mla.command.exit_codes import Exit
from mla.errors import MLAError
from mla.parallel.groups import Groups
from mla.parallel.layout import Layout
from mla.parallel.link import Line
from mla_backends import BackendError
from mla_backends.errors import describe

# How long a rank may wait for a command: rank 0 computes the oracle, and reads files. That it is gone shows
# at once, in a closed connection.
PATIENCE = timedelta(days=7)


class Crew:
    """This process's place among the ranks of `layout`. Every rank must make one, at the same time."""

    def __init__(self, layout: Layout, library: str, timeout: float) -> None:
        """`library`: of the device's collectives. `timeout`: seconds that a forward may wait for a rank."""
        self.layout, self.library = layout, library
        self.groups = Groups(layout, timeout)
        self._control = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._pulse: Pulse | None = None
        self._link: dict[str, Line] | None = None  # once measured

    @property
    def rank(self) -> int:
        """This process's number; 0 leads."""
        return self.groups.rank

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.layout.world

    @property
    def here(self) -> int:
        """Number of ranks on this process's device."""
        return 1

    def watch(self) -> None:
        """Watch the other ranks from now on."""
        served, meeting = pulse.open_store(self.world) if self.rank == 0 else (None, None)
        members = self.share(pulse.this_process())
        address = self.share(meeting)[0]
        self._pulse = Pulse(self.rank, members, address, pulse.die, served)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._pulse is not None
        if error is not None and not isinstance(error, RankLost):
            self._pulse.end(*_why(error))
        self._pulse.close()
        dist.destroy_process_group()

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Name the rank that is lost, if one is, for what a library raises in the block.

        Raises `RankLost`.
        """
        try:
            yield
        except RuntimeError as error:
            lost = self._pulse.lost(error) if self._pulse else None
            if lost is None:
                raise
            raise lost from error

    def end(self, code: int) -> int:
        """Have all other ranks end with this exit code, and return it; rank 0 only.

        A run that was interrupted may have left them in a forward: they are told otherwise.
        """
        if code in (Exit.INTERRUPTED, Exit.TERMINATED):
            assert self._pulse is not None
            self._pulse.end("interrupted", code)
        else:
            self.tell("end", int(code))
        return code

    def tell(self, *command: Any) -> None:
        """Send a command to all other ranks; rank 0 only."""
        with self.blamed():
            dist.broadcast_object_list([command], src=0, group=self._control, device=torch.device("cpu"))

    def hear(self) -> tuple[Any, ...]:
        """Return the next command; on any rank but 0."""
        box: list[Any] = [None]
        with self.blamed():
            dist.broadcast_object_list(box, src=0, group=self._control, device=torch.device("cpu"))
        command: tuple[Any, ...] = box[0]
        return command

    def gather(self, mine: Any) -> list[Any]:
        """Return what every rank gave, by rank, on rank 0; elsewhere nothing. All ranks must call it."""
        found: list[Any] | None = [None] * self.world if self.rank == 0 else None
        with self.blamed():
            dist.gather_object(mine, found, dst=0, group=self._control)
        return found or []

    def share(self, mine: Any) -> list[Any]:
        """Return what every rank gave, by rank, on all of them."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine, group=self._control)
        return found

    def wait(self) -> None:
        """Return once every rank is here."""
        with self.blamed():
            dist.barrier(group=self._control)

    def measure_link(self, device: torch.device, synchronize: Callable[[], None]) -> dict[str, Line]:
        """Return what collectives cost, by kind, measured once per run. All ranks must call it together."""
        if self._link is None:
            with self.blamed():
                self._link = link_fit.measured(self.groups, device, synchronize)
        return self._link

    def layer(
        self, setting: Setting, state: Mapping[str, torch.Tensor], name: str, ops: str | None
    ) -> Implementation:
        """Return this rank's part of a layer; on rank 0, the whole, which has all ranks do theirs."""
        part = RankLayer(setting, state, name, ops, self.groups)
        return LeadLayer(setting, part, self) if self.rank == 0 else part


def _why(error: BaseException) -> tuple[str, int]:
    """Return what to tell the other ranks of an error of this one, and the exit code for all."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", Exit.INTERRUPTED
    if isinstance(error, MLAError):
        return str(error).rstrip("."), int(error.exit_code)
    if isinstance(error, BackendError):
        return str(error).rstrip("."), Exit.BACKEND
    return describe(error), Exit.BACKEND
