"""What a sweep has found so far, in a file that it goes on with; and the tuning that sweeps speak for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from benchmarks.gpu.tuning.classes import TileClass
from mla.command.exit_codes import Exit
from mla.command.files import write_bytes
from mla.errors import MLAError, ResultError
from mla_backends.triton_ops.tuning import Tile, Tuning, card_file

BROKE_OFF = "the process ended while it was tried"


class Trial(msgspec.Struct, kw_only=True):
    """A tile in use. `us` holds a time per shape; without them `fault` says why there are none."""

    tile: Tile | None  # None: what the backend itself chooses
    us: dict[str, float] = {}
    fault: str = ""
    wrong: bool = False  # the result is not the reference's
    confirmed: bool = False  # also right with ragged lengths and the log-sum-exp

    @property
    def mean_us(self) -> float:
        """The geometric mean over shapes; infinite without times."""
        if self.fault or not self.us:
            return math.inf
        return math.exp(sum(map(math.log, self.us.values())) / len(self.us))


class Sweep(msgspec.Struct, kw_only=True):
    """The file. Times of another stack are no times of this one: `facts` tell them apart."""

    report: Literal["tiles"] = "tiles"
    schema_version: int = 1
    tuned: str  # name of the class
    facts: dict[str, str]
    trials: list[Trial] = []

    @property
    def stack(self) -> dict[str, str]:
        """The facts that times depend on."""
        return {name: value for name, value in self.facts.items() if name != "date"}

    def find(self, tile: Tile | None) -> Trial | None:
        """Return the trial of a tile."""
        return next((trial for trial in self.trials if trial.tile == tile), None)

    def put(self, trial: Trial) -> None:
        """Add a trial, in place of an older one of the same tile."""
        self.trials = [other for other in self.trials if other.tile != trial.tile] + [trial]

    def ranked(self) -> list[Trial]:
        """Return the trials of tiles that have a time, the fastest first."""
        timed = [trial for trial in self.trials if trial.tile and math.isfinite(trial.mean_us)]
        return sorted(timed, key=lambda candidate: candidate.mean_us)

    def best(self) -> Trial | None:
        """Return the fastest trial that was confirmed."""
        return next((trial for trial in self.ranked() if trial.confirmed), None)


def opened(path: Path, tuned: str, facts: Mapping[str, str]) -> Sweep:
    """Return the file's sweep if it is one of this stack, else a new one. Raises `ResultError`."""
    new = Sweep(tuned=tuned, facts=dict(facts))
    if not path.exists():
        return new
    old = read(path)
    return old if (old.tuned, old.stack) == (tuned, new.stack) else new


def read(path: Path) -> Sweep:
    """Read a file. Raises `ResultError`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Sweep)
    except (OSError, msgspec.DecodeError) as error:
        raise ResultError(f"'{path}' holds no sweep over tiles: {error}.") from error


def save(sweep: Sweep, path: Path) -> None:
    """Write the file whole or not at all. Raises `ResultError`."""
    write_bytes(msgspec.json.format(msgspec.json.encode(sweep), indent=1) + b"\n", path)


def sweeps_in(folder: Path) -> dict[str, Sweep]:
    """Return class -> its sweep, of those that a folder holds."""
    sweeps = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(ResultError):  # another file, such as the tuning
            sweeps.append(read(path))
    return {sweep.tuned: sweep for sweep in sweeps}


# ----------------------------------------------------------------------------------------------- choice

HEADER = ("calls", "tile", "us", "us as it was", "tried", "left out")
Sweeps = Mapping[str, Sweep]


class NothingMeasured(MLAError):
    """A class of calls has no tile that was timed."""

    exit_code = Exit.BACKEND


def chosen(classes: Sequence[TileClass], sweeps: Sweeps) -> dict[str, Trial]:
    """Return each class's best trial, by the geometric mean over its shapes. Raises `NothingMeasured`."""
    missing = [
        tuned.name for tuned in classes if tuned.name not in sweeps or sweeps[tuned.name].best() is None
    ]
    if missing:
        raise NothingMeasured(
            f"no tile was timed and confirmed for {', '.join(missing)}: "
            "run the sweeps again, with the same files."
        )
    if len({tuple(sorted(sweeps[tuned.name].stack.items())) for tuned in classes}) > 1:
        raise NothingMeasured("the sweeps are of different cards or versions: repeat them.")
    best = {tuned.name: sweeps[tuned.name].best() for tuned in classes}
    return {name: trial for name, trial in best.items() if trial is not None}


def tuning_of(classes: Sequence[TileClass], best: Mapping[str, Trial]) -> Tuning:
    """Return what a plugin reads."""
    tiles: dict[str, dict[int, Tile]] = {"latent": {}, "expanded": {}}
    for tuned in classes:
        tile = best[tuned.name].tile
        assert tile is not None
        tiles[tuned.kind][tuned.least] = tile
    return Tuning(tiles["latent"], tiles["expanded"])


def table(classes: Sequence[TileClass], sweeps: Sweeps) -> list[list[str]]:
    """Return a row under `HEADER` per class that was swept; times are geometric means over its shapes."""
    return [_row(tuned, sweeps[tuned.name]) for tuned in classes if tuned.name in sweeps]


def _row(tuned: TileClass, sweep: Sweep) -> list[str]:
    best = sweep.best()
    tried = [trial for trial in sweep.trials if trial.tile]
    return [
        f"{tuned.name}, from {tuned.least} rows", str(best.tile) if best else "-", _us(best),
        _us(sweep.find(None)), str(len(tried)), str(sum(bool(trial.fault) for trial in tried)),
    ]  # fmt: skip


def _us(trial: Trial | None) -> str:
    return f"{trial.mean_us:.1f}" if trial and math.isfinite(trial.mean_us) else "-"


def usage(path: Path, backend: str, card: str) -> str:
    """Return how a user runs with the tuning, and where a plugin of the project looks for it."""
    used = f"use it with: -O tuning={path.resolve()}"
    if ":" in backend:  # package.module:attribute
        return used
    return f"{used}\nship it as: plugins/{backend}/mla_backend_{backend}/tuning/{card_file(card)}"
