"""Try tiles one by one, each checked before it is timed, then the best with changes; and confirm the best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from benchmarks.gpu.tuning import problems, trials
from benchmarks.gpu.tuning.classes import TileClass
from benchmarks.gpu.tuning.trials import Sweep, Trial
from mla.command import console
from mla_backends.api import Backend, FusedOp
from mla_backends.errors import describe, one_line
from mla_backends.kernels.vendor import KernelRefused
from mla_backends.triton_ops.launcher import Launcher
from mla_backends.triton_ops.tuning import Tile, Tuning

BEST = 3  # tiles that are tried again with changes
# Of the time: a sweep that is cut short still tries the best with changes, and confirms one.
FOR_TILES, FOR_ALL = 0.7, 0.93
UNEVEN = "ragged lengths"
MAX_FAULT_CHARS = 200  # characters of a fault

MakeOps = Callable[[Tuning, Launcher], dict[str, FusedOp]]


@dataclass(frozen=True)
class Effort:
    """How long a call is timed: `calls` in a graph, replayed for `least_ms`, so many `rounds`."""

    calls: int = 10
    rounds: int = 5
    least_ms: float = 3.0
    most: int = 50  # replays of a round


def microseconds(backend: Backend, call: Callable[[], None], effort: Effort) -> float:
    """Return the time of a call on the device's clock, or on the host's without one; the median of rounds."""
    timer = backend.device_timer() or backend.timer()
    many = _graph(backend, call, effort.calls)

    def timed(replays: int) -> float:
        timer.start()
        for _ in range(replays):
            many()
        return timer.stop() / replays

    timed(1)
    replays = min(effort.most, max(1, math.ceil(effort.least_ms / max(timed(1), 1e-6))))
    return statistics.median(timed(replays) for _ in range(effort.rounds)) * 1e3 / effort.calls


def _graph(backend: Backend, call: Callable[[], None], calls: int) -> Callable[[], None]:
    """Return a function that makes so many calls: from a graph, where the device has them."""

    def several() -> None:
        for _ in range(calls):
            call()

    several()
    try:
        return backend.graph(several) or several
    except Exception:  # noqa: BLE001  # a stack raises anything when it cannot capture
        return several


def ops_of(backend: Backend) -> MakeOps:
    """Return a function that makes the Triton ops of a device with a tuning."""
    from mla_backends.triton_ops import triton_ops

    count = getattr(backend, "multiprocessors", None)
    multiprocessors = count() if callable(count) else None
    return lambda tuning, launcher: triton_ops(tuning, multiprocessors, launcher)


class Tuner:
    """A sweep over one class of calls. `left` returns the seconds that remain, of `seconds` in all."""

    def __init__(
        self, backend: Backend, tuned: TileClass, make_ops: MakeOps, path: Path, sweep: Sweep,
        effort: Effort, ragged: problems.Batch,
    ) -> None:  # fmt: skip
        self._backend, self._class, self._make_ops = backend, tuned, make_ops
        self._path, self._sweep, self._effort, self._ragged = path, sweep, effort, ragged

    @cached_property
    def _problems(self) -> dict[str, problems.Problem]:
        """What is timed, by shape."""
        device = self._backend.device
        return {
            str(shape): problems.of_shape(self._class.kind, shape, device) for shape in self._class.shapes
        }

    @cached_property
    def _uneven(self) -> problems.Problem:
        heads = self._class.shapes[0].heads
        return problems.problem(self._class.kind, self._ragged, heads, self._backend.device)

    def run(self, left: Callable[[], float], seconds: float) -> int:
        """Try what has not been tried. Return how many trials did not fit into the time."""
        tiles = self._class.tiles
        if self._sweep.find(None) is None:
            self._try(None)
        skipped = self._all(tiles, left, (1 - FOR_TILES) * seconds)
        best = [trial.tile for trial in self._sweep.ranked() if trial.tile in tiles][:BEST]
        skipped += self._all(self._class.finalists(best), left, (1 - FOR_ALL) * seconds)
        self._confirm()
        return skipped

    def _confirm(self) -> None:
        """Check the fastest tile with ragged lengths and the log-sum-exp, too; if it fails, the next.

        To a compiler they are other kernels, which would take every tile's time once more.
        """
        while (ranked := self._sweep.ranked()) and not ranked[0].confirmed:
            trial = ranked[0]
            self._keep(msgspec.structs.replace(trial, fault=trials.BROKE_OFF))
            self._carry_out(trial, self._check_uneven)
            trial.confirmed = not trial.fault
            self._keep(trial)
            console.note(f"{trial.tile}: {trial.fault or f'right with {UNEVEN}, too'}")

    def _all(self, wanted: Iterable[Tile], left: Callable[[], float], reserved: float) -> int:
        new = [tile for tile in wanted if self._sweep.find(tile) is None]
        for number, tile in enumerate(new):
            if left() <= reserved:
                return len(new) - number
            self._try(tile)
        return 0

    def _try(self, tile: Tile | None) -> None:
        """Try a tile, having noted that it is tried: a compiler may end the process."""
        self._keep(Trial(tile=tile, fault=trials.BROKE_OFF))
        trial = Trial(tile=tile)
        self._carry_out(trial, self._check_and_time)
        self._keep(trial)
        said = trial.fault or f"{trial.mean_us:.1f} us"
        console.note(f"{tile or 'as the backend has it'}: {said}")

    def _keep(self, trial: Trial) -> None:
        self._sweep.put(trial)
        trials.save(self._sweep, self._path)

    def _carry_out(self, trial: Trial, work: Callable[[Trial, FusedOp, Launcher], None]) -> None:
        """Do `work` with a trial's tile; what it raises is the trial's fault."""
        launcher = Launcher()
        try:
            work(trial, self._op(trial.tile, launcher), launcher)
        except KernelRefused as error:
            trial.fault = one_line(str(error))
        except Exception as error:  # noqa: BLE001  # compilers raise anything
            trial.fault = f"it raises {one_line(describe(error))[:MAX_FAULT_CHARS]}"

    def _check_and_time(self, trial: Trial, op: FusedOp, launcher: Launcher) -> None:
        for name, problem in self._problems.items():
            self._check(trial, problem.bound(op), problem, name, launcher)
        if not trial.fault:
            trial.us = {name: self._timed(op, problem) for name, problem in self._problems.items()}

    def _check_uneven(self, trial: Trial, op: FusedOp, launcher: Launcher) -> None:
        self._check(trial, self._uneven.bound(op, with_lse=True), self._uneven, UNEVEN, launcher)

    def _op(self, tile: Tile | None, launcher: Launcher) -> FusedOp:
        if tile is None:
            return self._backend.ops()[self._class.op]
        return self._make_ops(Tuning({1: tile}, {1: tile}), launcher)[self._class.op]

    def _check(
        self, trial: Trial, bound: problems.Bound, problem: problems.Problem, name: str, launcher: Launcher
    ) -> None:
        """Call once, unless something was wrong before, and note what is: another tile, or the numbers."""
        from mla.verify.tolerances import BOUNDS

        if trial.fault:
            return
        bound.call()
        if launcher.remarks:
            trial.fault = launcher.remarks[0]
        elif (error := problem.error(bound)) > BOUNDS[bound.out.dtype]:
            trial.fault, trial.wrong = f"wrong by {error:.2g} of a row's norm with {name}", True

    def _timed(self, op: FusedOp, problem: problems.Problem) -> float:
        return microseconds(self._backend, problem.bound(op).call, self._effort)
