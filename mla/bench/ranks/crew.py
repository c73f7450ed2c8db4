"""`Crew`: the ranks of a run and how they talk apart from the layer's own collectives.

Commands go from rank 0 to all others through gloo, on the host: the device's library carries tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch
import torch.distributed as dist

from mla.bench.ranks import link_fit
from mla.bench.ranks.agreement import Facts, agree, common_ops, demoted, remark
from mla.bench.ranks.errors import INTERRUPTED, Failure, RanksError, error_of, failure, word_of
from mla.bench.ranks.layers import LeadLayer, RankLayer
from mla.bench.ranks.pulse import Place, Pulse, blamed_on
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.setting import Ranks, Setting
from mla.command.console import note
from mla.parallel.groups import Groups
from mla.parallel.layout import Layout
from mla.parallel.link import Line

if TYPE_CHECKING:
    from mla.bench.plan.request import Request

# Seconds in which ranks that share heads tell each other that a forward failed.
GIVE = 5.0
# How long a rank may wait for a command: rank 0 computes the oracle, and reads files. That it is gone shows
# at once, in a closed connection.
PATIENCE = timedelta(days=7)
T = TypeVar("T")


class Crew(Ranks):
    """This process's place among the ranks of `layout`. Every rank must make one, at the same time."""

    here = 1

    groups: Groups  # once all have agreed on the layout

    def __init__(self, layout: Layout, library: str, timeout: float, pulse: Pulse, store: Any) -> None:
        """`library`: of the device's collectives. `timeout`: seconds that a forward may wait for a rank.

        `store`: of `torch.distributed`, which must be initialized.
        """
        self.layout, self.library = layout, library
        self._timeout, self._pulse, self._store = timeout, pulse, store
        hosts = [pulse.members[rank].host for rank in range(layout.world)]
        self.beside = hosts.count(hosts[self.rank]) - 1
        self._forwards, self._inside = 0, False
        self._before = 0, 0  # collectives that were entered, and left, before this forward
        self._demoted: dict[Any, dict[str, str]] = {}  # roles that run as reference, by layer
        self._link: dict[str, Line] | None = None  # once measured
        with blamed_on(pulse):
            self._control: Any = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def rank(self) -> int:
        """This process's number; 0 leads."""
        return self._pulse.rank

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            dist.destroy_process_group()  # which may wait for ranks that are not there, after an error
        self._pulse.close()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell the other ranks why this one fails in the block, if it does."""
        try:
            yield
        except BaseException as error:
            self.leave(*word_of(error))
            raise

    def leave(self, reason: str, code: int) -> None:
        """Tell the others why this rank ends, unless they know."""
        self._pulse.leave(reason, code)

    def agreed(self, request: Request, facts: Facts) -> Request:
        """Return what all ranks run: rank 0's implementations, with ops that all have. All must call it.

        Raises `RanksError` on all ranks where there is none, and where `facts` differ.
        """
        own = {plan.name: plan.ops for plan in request.scenarios}
        chosen, every = zip(*self.share((own, facts)), strict=True)
        agree(every)
        common = common_ops(chosen)
        if said := remark(chosen):
            note(said)
        for plan in request.scenarios:
            for name, roles in plan.ops.items():
                self._demoted[_key(plan.setting, name)] = demoted(roles, common[plan.name][name])
        with blamed_on(self._pulse):
            self.groups = Groups(self.layout, self._timeout)
        self._group = next(group for group in self.layout.head_groups() if self.rank in group)
        self._pulse.groups, self._pulse.place = self.layout.head_groups(), self._place
        plans = [replace(plan, ops=common[plan.name]) for plan in request.scenarios]
        return replace(request, scenarios=plans)

    def behind(self) -> str:
        """Name the ranks that keep the others waiting; "" if none does."""
        return self._pulse.behind()

    def when_lost(self, die: Callable[[RanksError], None]) -> None:
        """Have `die` end this process if another rank is lost while this one does something else."""
        self._pulse.die = die

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Name the rank that is lost, if one is, for what a library raises in the block.

        Raises `RanksError`. What is no error of a collective is probably this rank's own.
        """
        with blamed_on(self._pulse, own=True):
            yield

    def end(self, code: int) -> int:
        """Have all other ranks end with this exit code, and return it; rank 0 only.

        A run that was interrupted may have left them in a forward: they are told otherwise.
        """
        if code in INTERRUPTED:
            self.leave(INTERRUPTED[code], code)
        else:
            self.tell("end", int(code))
        return code

    def _place(self) -> Place:
        entered, left = self._before
        return Place(self._forwards, self._inside, self.groups.entered - entered, self.groups.left - left)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Name the rank that is lost, if one is: ranks that talk are in no forward. Raises `RanksError`."""
        self._inside = False
        with blamed_on(self._pulse):
            yield

    def tell(self, *command: Any) -> None:
        """Send a command to all other ranks; rank 0 only."""
        with self._talking():
            dist.broadcast_object_list([command], src=0, group=self._control, device=torch.device("cpu"))

    def hear(self) -> tuple[Any, ...]:
        """Return the next command; on any rank but 0."""
        box: list[Any] = [None]
        with self._talking():
            dist.broadcast_object_list(box, src=0, group=self._control, device=torch.device("cpu"))
        command: tuple[Any, ...] = box[0]
        return command

    def gather(self, mine: Any) -> list[Any]:
        """Return what every rank gave, by rank, on rank 0; elsewhere nothing. All ranks must call it."""
        found: list[Any] | None = [None] * self.world if self.rank == 0 else None
        with self._talking():
            dist.gather_object(mine, found, dst=0, group=self._control)
        return found or []

    def share(self, mine: Any) -> list[Any]:
        """Return what every rank gave, by rank, on all of them."""
        found: list[Any] = [None] * self.world
        with self._talking():
            dist.all_gather_object(found, mine, group=self._control)
        return found

    def wait(self) -> None:
        """Return once every rank is here, before a forward."""
        self._forwards, self._before = self._forwards + 1, (self.groups.entered, self.groups.left)
        with self._talking():
            dist.barrier(group=self._control)
        self._inside = True

    def concerted(
        self, implementation: str, work: Callable[[], object], failed: Failure | None = None
    ) -> bool:
        """Do this rank's part of a preparation; return whether all went well. All ranks must call it.

        `failed`: what a forward has left to be told, instead of that part. On rank 0, raises
        `UnsupportedBatch` or `OutOfMemory` where any rank's part failed that way.
        """
        own = failed
        try:
            if own is None:
                work()
        except Exception as error:
            own = failure(error, implementation)
            if own is None:
                raise
        error_of_all = error_of(self.share(own))
        if error_of_all is not None and self.rank == 0:
            raise error_of_all
        return error_of_all is None

    def alike(self, error: Exception, implementation: str) -> Failure | None:
        """Return what to tell of an error of a forward if all that share collectives failed at one place.

        None if they did not: one that goes on waits in a collective, and cannot be told.
        """
        own = failure(error, implementation, self._place().entered)
        if own is None or len(self._group) == 1:
            return own
        keys = [f"failed/{self._forwards}/{rank}" for rank in self._group]
        try:
            self._store.set(keys[self._group.index(self.rank)], msgspec.json.encode(own))
            self._store.wait(keys, timedelta(seconds=GIVE))
            places = {msgspec.json.decode(self._store.get(key), type=Failure).entered for key in keys}
        except RuntimeError:  # one has not failed, or is lost
            return None
        return own if len(places) == 1 else None

    def parts(self, mine: T | Failure) -> list[T]:
        """Return what every rank gave, as `gather` does.

        On rank 0, raises `UnsupportedBatch` or `OutOfMemory` where any rank gave a failure.
        """
        found = self.gather(mine)
        failed = error_of([one if isinstance(one, Failure) else None for one in found])
        if failed is not None:
            raise failed
        return found

    def attempt(self, implementation: str, work: Callable[[], T]) -> list[T]:
        """Do this rank's part of forwards that all run; on rank 0, return what each rank's part gave.

        On rank 0, raises `UnsupportedBatch` or `OutOfMemory` where a failure leaves no rank waiting; else
        `RanksError`, on the rank that failed.
        """
        mine: T | Failure
        try:
            mine = work()
        except Exception as error:
            own = failure(error, implementation)
            if own is None:
                raise
            alike = self.alike(error, implementation)
            if alike is None:  # others need this rank's part
                raise RanksError(f"rank {self.rank}: {own.sentence}", common=True) from error
            mine = alike
        return self.parts(mine)

    def measure_link(self, device: torch.device, synchronize: Callable[[], None]) -> dict[str, Line]:
        """Return what collectives cost, by kind, measured once per run. All ranks must call it together."""
        if self._link is None:
            with blamed_on(self._pulse):
                self._link = link_fit.measured(self.groups, device, synchronize)
        return self._link

    def layer(
        self, setting: Setting, state: Mapping[str, torch.Tensor], name: str, ops: str | None
    ) -> Implementation:
        """Return this rank's part of a layer; on rank 0, the whole, which has all ranks do theirs.

        What is measured together is built before any of it is loaded: so all that others still hold can go.
        """
        if self.rank == 0:
            self.tell("drop")
        overrides = {**dict(setting.overrides), **self._demoted.get(_key(setting, name), {})}
        setting = replace(setting, overrides=tuple(overrides.items()))
        part = RankLayer(setting, state, name, ops, self.groups)
        return LeadLayer(setting, part, self) if self.rank == 0 else part


def _key(setting: Setting, name: str) -> tuple[Any, ...]:
    return name, setting.dtype, setting.config.num_attention_heads
