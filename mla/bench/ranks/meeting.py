"""`Meeting`: the store in which ranks find each other, and leave word of why they end.

It is at MASTER_ADDR:MASTER_PORT, held by rank 0 or, under torchrun, by the launcher. No library's collectives
are needed for it, so it can name a rank that never came.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import torch.distributed as dist

from mla.bench.ranks.errors import RankLost, RanksError, late
from mla.bench.ranks.pulse import Ended, Member, first_word, leave, this_process
from mla_backends.errors import describe

# Seconds that ranks wait for each other at the start, that one which ends before waits for others to hear it,
# between looks, for a connection, and for what others give.
MEETING, WORD, LOOK, TRY, GIVE = 120.0, 5.0, 0.05, 10.0, 5.0

# Threads that torch uses on the host: a fact that no option need have set, so it has a cure of its own.
THREADS = "host threads:"
_SAME = "all ranks must be started with the same options and versions"
_CURES = {
    THREADS: "give all ranks the same number, with OMP_NUM_THREADS, `srun --cpus-per-task` or --threads",
}

_TCPStore: Any = vars(dist)["TCPStore"]  # whose stubs do not export them
_PrefixStore: Any = vars(dist)["PrefixStore"]


class Arrival(msgspec.Struct, frozen=True):
    """A rank that has come, and what it was asked for."""

    member: Member
    facts: dict[str, str]


class Meeting:
    """One rank's access to the store."""

    def __init__(
        self,
        rank: int,
        world: int,
        address: tuple[str, int],
        seconds: float | None = None,
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the store, or wait so long (`MEETING`) for the rank that holds it. Raises `RanksError`.

        `answered` is called whenever the store has answered, until all ranks have arrived.
        """
        seconds = MEETING if seconds is None else seconds
        self._answered = answered
        self.rank, self.world, self._address = rank, world, address
        self._known = False  # to the others, why this rank ends; or to this one, why they do
        holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            if not holds:
                _reach(address, seconds, answered)
            self._server = self._open(holds, seconds)  # lives as long as the run
            self.store = self.client()
        except Exception as error:
            raise RanksError(self._unreachable(holds, seconds, error)) from error

    def _open(self, holds: bool, seconds: float) -> Any:
        limit = timedelta(seconds=seconds)
        return _TCPStore(
            *self._address,
            self.world,
            is_master=holds,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )

    def client(self) -> Any:
        """Return a connection of its own: one that waits keeps others out."""
        attempt = os.environ.get(
            "TORCHELASTIC_RESTART_COUNT", "0"
        )  # of torchrun: nothing is left of the last
        return _PrefixStore(f"mla/{attempt}", self._open(False, MEETING))

    def _unreachable(self, holds: bool, seconds: float, error: Exception) -> str:
        host, port = self._address
        if holds:
            return (
                f"rank 0 cannot listen at port {port} ({describe(error)}): another run may use it; "
                "set MASTER_PORT to a free one, the same for all ranks."
            )
        return (
            f"rank 0 was not found at {host}:{port} within {seconds:.0f} s: it has not started, or has "
            "ended, or MASTER_ADDR and MASTER_PORT are not those of its node."
        )

    def arrive(self, facts: Mapping[str, str]) -> list[Arrival]:
        """Tell the others that this rank is here, and return all ranks once they are.

        Raises `RanksError` where one does not come, and `RankLost` where one has left word that it will not.
        """
        mine = Arrival(this_process(), dict(facts))
        limit = time.monotonic() + MEETING
        try:
            self.store.set(f"member/{self.rank}", msgspec.json.encode(mine))
            while missing := self._missing():
                self._answered()
                if time.monotonic() > limit:
                    here = self._arrivals([rank for rank in range(self.world) if rank not in missing])
                    hosts = dict.fromkeys(arrival.member.host for arrival in here)
                    raise RanksError(late(missing, MEETING, list(hosts)), common=True)
                time.sleep(LOOK)
            return self._arrivals(range(self.world))
        except RuntimeError as error:
            raise RankLost("rank 0 was gone before all ranks had met", 3) from error

    def _arrivals(self, ranks: Iterable[int]) -> list[Arrival]:
        found = self.store.multi_get([f"member/{rank}" for rank in ranks])
        return [msgspec.json.decode(one, type=Arrival) for one in found]

    def claim(self) -> None:
        """Raise `RanksError` if another process is this rank: it is that of another run, to be left alone."""
        if self.store.add(f"claimed/{self.rank}", 1) > 1:
            host, port = self._address
            raise RanksError(
                f"another run has a rank {self.rank} at {host}:{port}: set MASTER_PORT to a free port, the "
                "same for all ranks."
            )

    def _missing(self) -> list[int]:
        """Return who has not come yet. Raises `RankLost` when one never will."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        if lost := first_word(self.store, others):
            self.linger()
            raise lost
        return [rank for rank in range(self.world) if not self.store.check([f"member/{rank}"])]

    def exchanged(self, what: str, ranks: Sequence[int], mine: bytes) -> list[bytes]:
        """Return what each of these ranks, of which this is one, gave under a name that is used once.

        Nothing if one of them gives nothing within `GIVE`.
        """
        keys, limit = [f"{what}/{rank}" for rank in ranks], time.monotonic() + GIVE
        self.store.set(f"{what}/{self.rank}", mine)
        while not self.store.check(keys):
            if time.monotonic() > limit:
                return []
            time.sleep(LOOK)
        return [self.store.get(key) for key in keys]

    def leave(self, reason: str, code: int) -> None:
        """Tell the others why this rank ends, unless it ends because of them."""
        if not self._known:
            leave(self.store, self.rank, Ended(reason, code))
            self.linger()

    def linger(self, without: Collection[int] = ()) -> None:
        """Say that this rank knows why the run ends.

        Rank 0, which may hold the store, waits a moment until all but `without` do.
        """
        self._known = True
        others = [rank for rank in range(1, self.world) if rank not in without]
        with contextlib.suppress(Exception):
            self.store.set(f"heard/{self.rank}", b"1")
            limit = time.monotonic() + WORD
            while self.rank == 0 and time.monotonic() < limit and not all(map(self._has_heard, others)):
                time.sleep(LOOK)

    def _has_heard(self, rank: int) -> bool:
        return any(self.store.check([f"{word}/{rank}"]) for word in ("heard", "ended"))


def _reach(address: tuple[str, int], seconds: float, tried: Callable[[], None]) -> None:
    """Return once somebody listens there. Raises OSError after so many seconds.

    torch, which would wait as well, writes a page of warnings, and may take longer.
    """
    limit = time.monotonic() + seconds
    while True:
        tried()
        try:
            socket.create_connection(address, timeout=min(TRY, max(0.1, limit - time.monotonic()))).close()
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(LOOK)
        else:
            return


def agree(facts: Sequence[Mapping[str, str]]) -> None:
    """Raise `RanksError`, on all ranks, where one was asked for something else than rank 0."""
    for rank, found in enumerate(facts):
        for name, value in found.items():
            if value != facts[0].get(name):
                raise RanksError(
                    f"rank {rank} has {name} {value}, and rank 0 has {facts[0].get(name)}: "
                    f"{_CURES.get(name, _SAME)}.",
                    common=True,
                )
