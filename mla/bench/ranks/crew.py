"""`Crew`: the ranks of a run and how they talk apart from the layer's own collectives.

Commands go from rank 0 to all others through gloo, on the host: the device's library carries tensors alone.
What ranks must have alike is exchanged once: options, versions, what files hold, and chosen ops.
"""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from time import perf_counter_ns as now_ns
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch
import torch.distributed as dist

import mla
from mla.bench import results
from mla.bench.measure.engine import refusal, too_large
from mla.bench.ranks.layers import LeadLayer, RankLayer
from mla.bench.ranks.pulse import BEAT, Pulse
from mla.bench.results.stats import median
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.setting import Ranks, Setting
from mla.checkpoint import fingerprint, read_layer
from mla.command.environment import build_digest
from mla.command.exit_codes import Exit
from mla.errors import MLAError, OutOfMemory, RanksError, UnsupportedBatch, UnsupportedOps
from mla.parallel.groups import CollectiveError, Groups, all_gather
from mla.parallel.layout import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, Call, Layout, Line, fit
from mla.text import listed, numbered
from mla_backends.errors import first_line

if TYPE_CHECKING:
    from mla.bench.plan.request import Request

# How long a rank may wait for a command: rank 0 computes the oracle, and reads files. That it is gone shows
# at once, in a closed connection.
COMMAND_TIMEOUT = timedelta(days=7)
BROKEN_S = 5.0  # seconds without a beat after which a rank is lost once a connection to some rank has broken
HANGS = "it is assumed to hang; raise --hang-after to wait longer"
# Bytes of the tensors that the link is measured with: below the first, a message costs about as much as an
# empty one; the second is that of a prefill's output. Collectives of each, after as many warm-ups.
LINK_BYTES, LINK_TIMES, LINK_WARMUPS = (32 << 10, 8 << 20), 11, 3
INTERRUPTED = {Exit.INTERRUPTED: "interrupted", Exit.TERMINATED: "by SIGTERM", Exit.HUNG_UP: "by SIGHUP"}
T = TypeVar("T")


def failure(error: Exception, implementation: str) -> MLAError | None:
    """Return what an error costs that is a case on one device: an op refuses, or memory is short.

    On one device the next case runs after that. On several it does as well, unless another rank waits in a
    collective by then, which cannot be taken back. None for an error that ends the run.
    """
    if reason := str(error) if isinstance(error, UnsupportedOps) else refusal(error, implementation):
        return UnsupportedBatch(reason)
    return OutOfMemory(first_line(error) or type(error).__name__) if too_large(error) else None


def error_of(parts: Sequence[object]) -> MLAError | None:
    """Return what failed on ranks, as the first of them has it; None if every part is there."""
    failed = {rank: part for rank, part in enumerate(parts) if isinstance(part, MLAError)}
    if not failed:
        return None
    rank, first = next(iter(failed.items()))
    alike = len(set(map(str, failed.values()))) == 1 and len(failed) == len(parts)
    return type(first)(str(first) if alike else f"rank {rank}: {first}")


@contextmanager
def blamed_on(pulse: Pulse, computes: bool = False) -> Iterator[None]:
    """Name the rank that is lost, if one is, for what a library raises in the block. Raises `RanksError`.

    `computes`: this rank does as well, so only a `CollectiveError` is worth waiting for who is to blame.
    """
    try:
        yield
    except RuntimeError as error:
        patience = 0.0
        if not computes or isinstance(error, CollectiveError):
            pulse.limit = min(BROKEN_S, pulse.limit)
            patience = pulse.limit + 4 * BEAT
        if pulse.over.wait(patience) and pulse.lost is not None:
            raise pulse.lost from error
        if isinstance(error, CollectiveError) and (behind := pulse.behind()):
            raise RanksError(
                f"{behind} did not join a collective that other ranks wait in: {HANGS}"
            ) from error
        raise


class Crew(Ranks):
    """This process's place among the ranks of `layout`. Every rank must make one, at the same time."""

    groups: Groups  # once all have agreed on the layout

    def __init__(self, layout: Layout, library: str, timeout: float, pulse: Pulse) -> None:
        """`library`: of the device's collectives. `timeout`: seconds that a forward may wait for a rank.

        `torch.distributed` must be initialized.
        """
        self.layout, self.library, self.rank = layout, library, pulse.rank  # rank 0 leads
        self._timeout, self._pulse = timeout, pulse
        self.leave, self.behind = pulse.leave, pulse.behind  # type: ignore[method-assign]
        self.blamed = partial(blamed_on, pulse, computes=True)  # for what a library raises in a block
        self._forwards, self._before = 0, 0  # and collectives that were entered before this forward
        self._talks = False  # waits for the others, or for a command
        self._overrides: dict[Any, dict[str, str]] = {}  # roles whose op rank 0 chose otherwise, by layer
        self._link: dict[str, Line] | None = None  # once measured
        with blamed_on(pulse):
            self._control: Any = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)
        self.beside = self.share(socket.gethostname()).count(socket.gethostname()) - 1

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:  # else the others are told why, and a library may wait for ranks that are not there
            self._pulse.close()  # first: rank 0 may be gone before this one has ended its libraries
            dist.destroy_process_group()

    def agreed(self, request: Request, facts: Mapping[str, str]) -> Request:
        """Return what all ranks run: rank 0's implementations, with the ops that it chose. All must call it.

        A backend may choose by a measurement, and then not alike on all. Raises `RanksError` on all ranks
        where `facts` differ.
        """
        chosen = {plan.name: plan.ops for plan in request.scenarios}
        chosen_by_all, facts_of_all = zip(*self.share((chosen, facts)), strict=True)
        agree(facts_of_all)
        for plan in request.scenarios:
            for name, ops in chosen_by_all[0][plan.name].items():
                roles = plan.ops.get(name, {})  # `mla[ROLE=*]` may stand for others here
                others = {role: op for role, op in ops.items() if roles.get(role) != op}
                self._overrides[_key(plan.setting, name)] = others
        with blamed_on(self._pulse):
            self.groups = Groups(self.layout, self._timeout)
        self._pulse.place = self._place
        plans = [replace(plan, ops=chosen_by_all[0][plan.name]) for plan in request.scenarios]
        return replace(request, scenarios=plans)

    def _place(self) -> int:
        """Return how far this rank is: in which forward, and there in which collective or behind all of them.

        It is asked from another thread.
        """
        steps = self.groups.entered + self.groups.left - 2 * self._before  # into collectives, and out of them
        return (self._forwards << 32) + (-1 + (1 << 32) if self._talks else steps)

    def when_lost(self, die: Callable[[RanksError], None]) -> None:
        """Have `die` end this process if another rank is lost while this one does something else."""
        self._pulse.die = die

    @contextmanager
    def awaited(self, implementation: str) -> Iterator[None]:
        """End the run, on all ranks, if this one fails in the block: the others wait for it.

        Raises `RanksError` for what would cost one device no more than the case.
        """
        try:
            yield
        except Exception as error:
            if (failed := failure(error, implementation)) is not None:
                raise RanksError(f"rank {self.rank}: {failed}", common=True) from error
            raise

    def end(self, code: int) -> int:
        """Have all other ranks end with this exit code, and return it; rank 0 only.

        A run that was interrupted may have left them in a forward: they are told otherwise.
        """
        if code in INTERRUPTED:
            self.leave(INTERRUPTED[Exit(code)], code)
        else:
            self.tell("end", int(code))
        return code

    # ------------------------------------------------------------------------------------------- talking

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Name the rank that is lost, if one is. Raises `RanksError`."""
        self._talks = True
        with blamed_on(self._pulse):
            yield
        self._talks = False

    def tell(self, *command: Any) -> None:
        """Send a command to all other ranks; rank 0 only."""
        with self._talking():
            dist.broadcast_object_list([command], src=0, group=self._control, device=torch.device("cpu"))

    def hear(self) -> tuple[Any, ...]:
        """Return the next command; on any rank but 0."""
        box: list[Any] = [None]
        with self._talking():
            dist.broadcast_object_list(box, src=0, group=self._control, device=torch.device("cpu"))
        return box[0]

    def gather(self, mine: T) -> list[T]:
        """Return what every rank gave, by rank, on rank 0; elsewhere nothing. All ranks must call it."""
        every: list[Any] | None = [None] * self.world if self.rank == 0 else None
        with self._talking():
            dist.gather_object(mine, every, dst=0, group=self._control)
        return every or []

    def share(self, mine: T) -> list[T]:
        """Return what every rank gave, by rank, on all of them."""
        every: list[Any] = [None] * self.world
        with self._talking():
            dist.all_gather_object(every, mine, group=self._control)
        return every

    def wait(self) -> None:
        """Return once every rank is here, before a forward."""
        self._forwards, self._before = self._forwards + 1, self.groups.entered
        with self._talking():
            dist.barrier(group=self._control)

    def attempt(self, implementation: str, work: Callable[[], T], together: bool = False) -> list[T]:
        """Do this rank's part of what all ranks do; on rank 0, return what each rank's part gave.

        `together`: parts need each other once no op has refused them. On rank 0, raises `UnsupportedBatch` or
        `OutOfMemory` where any rank's part failed; on one that leaves others waiting, `RanksError`.
        """
        mine: T | MLAError
        try:
            mine = work()
        except Exception as error:
            refused = failure(error, implementation)
            if refused is None or (together and isinstance(refused, OutOfMemory)):
                with self.awaited(implementation):
                    raise
            mine = refused
        parts: list[Any] = self.gather(mine)
        if (failed := error_of(parts)) is not None:
            raise failed
        return parts

    # ----------------------------------------------------------------------------------------- measuring

    def measure_link(self, device: torch.device, synchronize: Callable[[], None]) -> dict[str, Line]:
        """Return what collectives cost, by kind, measured once per run. All ranks must call it together."""
        if self._link is None:
            with blamed_on(self._pulse):
                self._link = measured_link(self.groups, device, synchronize)
        return self._link

    def layer(
        self, setting: Setting, state: Mapping[str, torch.Tensor], name: str, ops: str | None
    ) -> Implementation:
        """Return this rank's part of a layer; on rank 0, the whole, which has all ranks do theirs.

        What is measured together is built before any of it is loaded: so all that others still hold can go.
        """
        if self.rank == 0:
            self.tell("drop")
        overrides = {**dict(setting.overrides), **self._overrides.get(_key(setting, name), {})}
        setting = replace(setting, overrides=tuple(overrides.items()))
        part = RankLayer(setting, state, name, ops, self.groups, self.wait)
        return LeadLayer(setting, part, self) if self.rank == 0 else part


def _key(setting: Setting, name: str) -> tuple[Any, ...]:
    return name, setting.dtype, setting.config.num_attention_heads


def measured_link(groups: Groups, device: torch.device, synchronize: Callable[[], None]) -> dict[str, Line]:
    """Return kind -> line, among the ranks that share all heads; {} for one rank alone.

    All of them must call it together. Each has times of its own, and of a collective the slowest counts.
    """
    ranks, group = groups.layout.head_parts, groups.heads
    points: dict[str, list[tuple[Call, float]]] = {}
    for nbytes in LINK_BYTES if ranks > 1 else ():
        x = torch.zeros(ranks, nbytes // ranks // 2, dtype=torch.bfloat16, device=device)
        out, part = torch.zeros_like(x), torch.zeros_like(x[0])
        for call, collective in (
            (Call(ALL_REDUCE, ranks, x.nbytes), partial(dist.all_reduce, x, group=group)),
            (Call(ALL_GATHER, ranks, part.nbytes), partial(all_gather, out.view(-1), part, group=group)),
            (Call(ALL_TO_ALL, ranks, x.nbytes), partial(dist.all_to_all_single, out, x, group=group)),
        ):
            points.setdefault(call.kind, []).append((call, _seconds(collective, synchronize, group)))
    return {kind: fit(small, large) for kind, (small, large) in points.items()}


def _seconds(run: Callable[[], Any], synchronize: Callable[[], None], group: Any) -> float:
    """Return the seconds of a collective from a common start, on the slowest rank."""
    taken = []
    for _ in range(LINK_WARMUPS + LINK_TIMES):
        dist.barrier(group=group)
        synchronize()
        start = now_ns()
        run()
        synchronize()
        taken.append((now_ns() - start) / 1e9)
    slowest: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(slowest, taken[LINK_WARMUPS:], group=group)
    return median([max(times) for times in zip(*slowest, strict=True)])


# ------------------------------------------------------------------------------------------------- agreement

# Options that may differ between ranks: rank 0 writes, prints and judges, each has a device of its own.
_MAY_DIFFER = (
    *("device", "output", "resume", "baseline", "profile", "dump_failure"),
    *("kind", "detail", "fail_slower", "strict"),
)
_THREADS = "threads of --threads, OMP_NUM_THREADS or `srun --cpus-per-task`"


def facts(request: Request) -> dict[str, str]:
    """Return name -> value of what must be the same on all ranks, or its digest.

    Files of one name may hold something else on another node. Raises `CheckpointError` and `ResultError`.
    """
    setting, backend, options = request.setting, request.setting.backend, request.options
    given = {name: str(value) for name, value in vars(options).items() if name not in _MAY_DIFFER}
    facts = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    facts |= {"mla": mla.__version__, "torch": torch.__version__, "Python": platform.python_version()}
    facts |= {backend.name: f"{request.backend_version}, {build_digest(backend)}"}
    if setting.device.type == "cpu":  # else no result counts them
        facts[_THREADS] = str(torch.get_num_threads())
    facts |= {f"config's {name}": str(value) for name, value in asdict(setting.config).items()}
    facts |= {f"scenario '{point.name}'": _digest(msgspec.json.encode(point)) for point in request.points}
    if options.model_path is not None:
        facts |= fingerprint(read_layer(options.model_path, setting.config, options.layer))
    for option in options.backend_options:
        if (path := Path(option.partition("=")[2])).is_file():
            facts[f"'{path}'"] = _digest(results.content(path))
    return facts


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def agree(by_rank: Sequence[Mapping[str, str]]) -> None:
    """Raise `RanksError`, on all ranks, where some have something else than rank 0."""
    expected = by_rank[0]
    others = [rank for rank, given in enumerate(by_rank) if given != expected]
    if others:
        given = by_rank[others[0]]
        apart = [name for name in {**expected, **given} if given.get(name) != expected.get(name)]
        raise RanksError(
            f"{numbered('rank', others)} differ{'s' * (len(others) == 1)} from rank 0 in "
            f"{listed([f'{name} ({given.get(name)}, not {expected.get(name)})' for name in apart])}: all "
            "need the same options, packages and files, and every run a MASTER_PORT of its own",
            common=True,
        )
