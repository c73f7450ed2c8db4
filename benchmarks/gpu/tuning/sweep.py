"""Try tiles one by one, each checked before it is timed, and then the best with changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

from benchmarks.gpu.tuning import problems, trials
from benchmarks.gpu.tuning.classes import TileClass
from benchmarks.gpu.tuning.timing import Effort, microseconds
from benchmarks.gpu.tuning.trials import Sweep, Trial
from mla.command import console
from mla_backends.api import Backend, FusedOp
from mla_backends.errors import describe, one_line
from mla_backends.kernels.vendor import KernelRefused
from mla_backends.triton_ops.launcher import Launcher
from mla_backends.triton_ops.tuning import Tile, Tuning

BEST = 3  # tiles that are tried again with changes
FOR_TILES = 0.7  # of the time; a sweep that is cut short still compares the rest
LONGEST = 200  # characters of a fault

MakeOps = Callable[[Tuning, Launcher], dict[str, FusedOp]]


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
        effort: Effort, ragged: problems.Lengths,
    ) -> None:  # fmt: skip
        self._backend, self._class, self._make_ops = backend, tuned, make_ops
        self._path, self._sweep, self._effort, self._ragged = path, sweep, effort, ragged

    @cached_property
    def _problems(self) -> dict[str, problems.Problem]:
        """What is timed, by shape."""
        device = self._backend.device
        return {str(one): problems.of_shape(self._class.kind, one, device) for one in self._class.shapes}

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
        best = [one.tile for one in self._sweep.ranked() if one.tile in tiles][:BEST]
        return skipped + self._all(self._class.finalists(best), left, 0.0)

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
        trial = self._found(tile)
        self._keep(trial)
        said = trial.fault or f"{trial.mean_us:.1f} us"
        console.note(f"{tile or 'as the backend has it'}: {said}")

    def _keep(self, trial: Trial) -> None:
        self._sweep.put(trial)
        trials.save(self._sweep, self._path)

    def _found(self, tile: Tile | None) -> Trial:
        launcher, trial = Launcher(), Trial(tile=tile)
        try:
            op = self._op(tile, launcher)
            trial.fault, trial.wrong = self._checked(op, launcher)
            if not trial.fault:
                trial.us = {name: self._timed(op, one) for name, one in self._problems.items()}
        except KernelRefused as error:
            trial.fault = one_line(str(error))
        except Exception as error:  # noqa: BLE001  # compilers raise anything
            trial.fault = f"it raises {one_line(describe(error))[:LONGEST]}"
        return trial

    def _op(self, tile: Tile | None, launcher: Launcher) -> FusedOp:
        if tile is None:
            return self._backend.ops()[self._class.op]
        return self._make_ops(Tuning({1: tile}, {1: tile}), launcher)[self._class.op]

    def _checked(self, op: FusedOp, launcher: Launcher) -> tuple[str, bool]:
        """Run an op on every problem. Return what is wrong, "" if nothing, and whether its numbers are."""
        from mla.verify.bounds import BOUNDS

        for name, one in {"ragged lengths": self._uneven, **self._problems}.items():
            bound = one.bound(op)
            bound.call()
            if launcher.remarks:
                return launcher.remarks[0], False
            error = one.error(bound.out)
            if error > BOUNDS[bound.out.dtype]:
                return f"wrong by {error:.2g} of a row's norm with {name}", True
        return "", False

    def _timed(self, op: FusedOp, one: problems.Problem) -> float:
        return microseconds(self._backend, one.bound(op).call, self._effort)
