"""From sweeps to a tuning: the fastest tile of every class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.tuning.classes import TileClass
from benchmarks.gpu.tuning.trials import Sweep, Trial
from mla.command.exit_codes import Exit
from mla.errors import MLAError
from mla_backends.triton_ops.tuning import Tile, Tuning, card_file

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
