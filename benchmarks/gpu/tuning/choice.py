"""From sweeps to a tuning: the fastest tile of every class, and what all have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.tuning.classes import Common, TileClass
from benchmarks.gpu.tuning.trials import Sweep, Trial
from mla.command.exit_codes import Exit
from mla.errors import MLAError
from mla_backends.triton_ops.tuning import Tile, Tuning

HEADER = ("calls", "tile", "with", "us", "us as it was", "tried", "left out")
Sweeps = Mapping[str, Sweep]


class NothingMeasured(MLAError):
    """A class of calls has no tile that was timed."""

    exit_code = Exit.BACKEND


def chosen(classes: Sequence[TileClass], sweeps: Sweeps) -> dict[str, Trial]:
    """Return the best trial of every class, by the geometric mean over its shapes. Raises `NothingMeasured`.

    Classes that were tried with several `commons` all get the one with the least product of their times.
    """
    missing = [one.name for one in classes if one.name not in sweeps or not sweeps[one.name].ranked()]
    if missing:
        raise NothingMeasured(
            f"no tile was timed for {', '.join(missing)}: run the section again, in the same folder."
        )
    if len({tuple(sorted(sweeps[one.name].stack.items())) for one in classes}) > 1:
        raise NothingMeasured("the sweeps are of different cards or versions: repeat them (--again tune).")
    split = [one.name for one in classes if len(one.commons) > 1]
    common = _common([sweeps[name] for name in split])
    return {one.name: sweeps[one.name].ranked(common if one.name in split else None)[0] for one in classes}


def _common(sweeps: Sequence[Sweep]) -> Common:
    """Return that with which the best tiles of all sweeps are fastest together."""
    tried = dict.fromkeys(trial.common for sweep in sweeps for trial in sweep.ranked())

    def cost(common: Common) -> float:
        best = [sweep.ranked(common)[:1] for sweep in sweeps]
        return sum(math.log(one[0].mean_us) if one else math.inf for one in best)

    return min(tried, key=cost, default=Common())


def tuning_of(classes: Sequence[TileClass], best: Mapping[str, Trial]) -> Tuning:
    """Return what a plugin reads."""
    tiles: dict[str, dict[int, Tile]] = {"latent": {}, "expanded": {}}
    for one in classes:
        tile = best[one.name].tile
        assert tile is not None
        tiles[one.kind][one.least] = tile
    split = [best[one.name].common for one in classes if len(one.commons) > 1]
    common = split[0] if split else Common()
    return Tuning(tiles["latent"], tiles["expanded"], common.programs, common.halves)


def table(classes: Sequence[TileClass], sweeps: Sweeps) -> list[list[str]]:
    """Return a row under `HEADER` per class that was swept; times are geometric means over its shapes."""
    try:
        best: Mapping[str, Trial] = chosen(classes, sweeps)
    except NothingMeasured:
        best = {name: one.ranked()[0] for name, one in sweeps.items() if one.ranked()}
    return [_row(one, sweeps[one.name], best.get(one.name)) for one in classes if one.name in sweeps]


def _row(one: TileClass, sweep: Sweep, best: Trial | None) -> list[str]:
    now = next((trial for trial in sweep.trials if trial.tile is None), None)
    tried = [trial for trial in sweep.trials if trial.tile]
    return [
        f"{one.name}, from {one.least} rows",
        *([str(best.tile), str(best.common)] if best else ["-", "-"]),
        _us(best), _us(now), str(len(tried)), str(sum(bool(trial.fault) for trial in tried)),
    ]  # fmt: skip


def _us(trial: Trial | None) -> str:
    return f"{trial.mean_us:.1f}" if trial and math.isfinite(trial.mean_us) else "-"


def usage(path: Path) -> str:
    """Return how a user runs with the tuning."""
    return f"use it with: -O tuning={path.resolve()}"
