"""The sweep over tiles, with ops whose times are known, and the tuning that it writes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import tune
from benchmarks.gpu.tuning import trials
from benchmarks.gpu.tuning.classes import FULL, SMOKE, Change, Shape, TileClass, classes
from benchmarks.gpu.tuning.sweep import BEST, Effort, Tuner
from benchmarks.gpu.tuning.trials import Sweep, Trial
from mla.errors import UnsupportedOps
from mla.reference import REFERENCE
from mla_backends import FusedOp
from mla_backends.kernels.vendor import KernelRefused
from mla_backends.triton_ops.launcher import Launcher
from mla_backends.triton_ops.tuning import Tile, Tuning, read_tuning

CPU = torch.device("cpu")
QUICK = Effort(calls=2, rounds=3, least_ms=0.0)
RAGGED = ((1, 2), (5, 9))
RAGGED_ROWS = 3  # which no shape has
A, B, C, D = (Tile(16, keys, 4, stages) for keys in (16, 32) for stages in (1, 2))


def ignored(*_: object) -> None:
    """Do nothing."""


class Device:
    """A backend whose clock moves by what its ops say that they cost, in milliseconds."""

    name = "acme"
    device = CPU

    def __init__(self, act: Callable[..., None] = ignored, sum_up: Callable[..., None] = ignored) -> None:
        """`act` of a tile, its launcher and `out`; `sum_up` of a tile and its log-sum-exp."""
        self.act, self.sum_up, self.now = act, sum_up, 0.0
        self.called: list[tuple[Tile, int, bool]] = []  # with so many rows, and with lse or not

    def ops(self) -> dict[str, FusedOp]:
        return self.make(Tuning({1: A}, {1: A}), Launcher())

    def make(self, tuning: Tuning, launcher: Launcher) -> dict[str, FusedOp]:
        return {
            f"triton_{kind}": Op(self, kind, tiles[1], launcher)
            for kind, tiles in (("latent", tuning.latent), ("expanded", tuning.expanded))
        }

    def cost(self, tile: Tile) -> float:
        return tile.keys * tile.stages / tile.programs * (1 if tile.halves else 1.25)

    def timer(self) -> Any:
        began = []
        return SimpleNamespace(start=lambda: began.append(self.now), stop=lambda: self.now - began[-1])

    def device_timer(self) -> Any:
        return None

    def graph(self, call: Callable[[], None]) -> Any:
        raise RuntimeError("no graphs")


class Op(FusedOp):
    """The reference's numbers, at a price."""

    def __init__(self, device: Device, kind: str, tile: Tile, launcher: Launcher) -> None:
        self._device, self._real = device, REFERENCE[f"{kind}_attention"]
        self._tile, self._launcher = tile, launcher
        self.contract, self.lse_optional = self._real.contract, True

    def prepare(self, spec: Any, batch: Any) -> Any:
        return self._real.prepare(spec, batch)

    def __call__(self, state: Any, **tensors: Any) -> None:
        self._real(state, **tensors)
        self._device.now += self._device.cost(self._tile)
        self._device.called.append((self._tile, len(tensors["out"]), tensors["lse"] is not None))
        self._device.act(self._tile, self._launcher, tensors["out"])
        if tensors["lse"] is not None:
            self._device.sum_up(self._tile, tensors["lse"])


TWO, WHOLE = {"programs": 2}, {"halves": False}


def tuned(*tiles: Tile, kind: Any = "latent", changes: tuple[Change, ...] = (TWO, WHOLE)) -> TileClass:
    return TileClass("latent-16", kind, 1, (Shape(2, 9, 2), Shape(1, 20, 2, 2)), tiles, changes)


def tuner(device: Device, tiles: TileClass, path: Path) -> tuple[Tuner, Sweep]:
    sweep = trials.opened(path, tiles.name, {"card": "X", "date": "today"})
    return Tuner(device, tiles, device.make, path, sweep, QUICK, RAGGED), sweep  # type: ignore[arg-type]


def always() -> float:
    return 1e9


@pytest.mark.parametrize("kind", ["latent", "expanded"])
def test_tiles_are_ranked_by_their_times_on_all_shapes(kind: str, tmp_path: Path) -> None:
    sweeping, sweep = tuner(Device(), tuned(D, A, B, C, kind=kind), tmp_path / "x.json")
    assert sweeping.run(always, 60) == 0
    twice = [replace(tile, **TWO) for tile in (A, B, C, D)]
    assert [trial.tile for trial in sweep.ranked()][:5] == [
        twice[0], A, twice[1], twice[2], replace(A, **WHOLE)
    ]  # fmt: skip
    assert sweep.ranked()[1].us == pytest.approx(
        {"2 requests x 9 keys, 2 heads": 16e3, "1 requests x 2 queries x 20 keys, 2 heads": 16e3}
    )
    assert len([trial for trial in sweep.trials if trial.tile in twice]) == BEST
    assert trials.read(tmp_path / "x.json") == sweep


def test_a_tile_that_does_not_fit_is_wrong_or_breaks_is_left_out_with_the_reason(tmp_path: Path) -> None:
    def troubled(tile: Tile, launcher: Launcher, out: torch.Tensor) -> None:
        if tile == A:
            launcher.remarks.append("attend runs with another tile, as 16 rows do not fit this device")
        if tile == B:
            out[-1] *= 1.05
        if tile == C:
            raise KernelRefused("attend does not fit this device in any tile.")

    device = Device(troubled)
    device.ops = lambda: device.make(Tuning({1: D}, {1: D}), Launcher())  # type: ignore[method-assign]
    sweeping, sweep = tuner(device, tuned(A, B, C, D, changes=()), tmp_path / "x.json")
    sweeping.run(always, 60)
    assert [trial.tile for trial in sweep.ranked()] == [D]
    faults = {trial.tile: (trial.fault, trial.wrong) for trial in sweep.trials}
    assert faults[A] == ("attend runs with another tile, as 16 rows do not fit this device", False)
    assert faults[B][0].startswith("wrong by 0.05 of a row's norm with 2 requests x 9 keys")
    assert faults[B][1]
    assert faults[C] == ("attend does not fit this device in any tile.", False)
    assert tune.say_best(sweep) == 4


def test_every_shape_is_checked_before_any_is_timed(tmp_path: Path) -> None:
    def late_fault(tile: Tile, launcher: Launcher, out: torch.Tensor) -> None:
        out[0] *= 2 if len(out) == 2 else 1

    device = Device(late_fault)
    tiles = TileClass("latent-16", "latent", 1, (Shape(3, 9, 2), Shape(2, 20, 2)), (A,))
    sweeping, sweep = tuner(device, tiles, tmp_path / "x.json")
    sweeping.run(always, 60)
    assert {trial.fault for trial in sweep.trials} == {
        "wrong by 1 of a row's norm with 2 requests x 20 keys, 2 heads"
    }
    assert device.now == 2 * 2 * device.cost(A), "two trials of two shapes, once each"


def test_only_the_fastest_is_checked_with_ragged_lengths_and_lse_and_all_is_timed_without(
    tmp_path: Path,
) -> None:
    device, path = Device(), tmp_path / "x.json"
    sweeping, sweep = tuner(device, tuned(A, B, C), path)
    sweeping.run(always, 60)
    best = sweep.best()
    assert best is not None
    assert best.tile == replace(A, **TWO) == sweep.ranked()[0].tile
    assert [trial.tile for trial in sweep.trials if trial.confirmed] == [best.tile]
    with_lse = [(tile, rows) for tile, rows, lse in device.called if lse]
    assert with_lse == [(best.tile, RAGGED_ROWS)]
    assert [rows for _, rows, _ in device.called].count(RAGGED_ROWS) == 1
    again = Device()
    tuner(again, tuned(A, B, C), path)[0].run(always, 60)
    assert not again.called, "it is confirmed already"


@pytest.mark.parametrize("of", ["rows", "lse"])
def test_the_next_tile_is_taken_if_the_fastest_is_wrong_where_lengths_differ(of: str, tmp_path: Path) -> None:
    def uneven(tile: Tile, launcher: Launcher, out: torch.Tensor) -> None:
        if of == "rows" and tile in (A, B) and len(out) == RAGGED_ROWS:
            out[-1] *= 1.05

    def uneven_sum(tile: Tile, lse: torch.Tensor) -> None:
        if of == "lse" and tile in (A, B):
            lse[0, 0] += 0.1

    sweeping, sweep = tuner(Device(uneven, uneven_sum), tuned(A, B, C, D, changes=()), tmp_path / "x.json")
    sweeping.run(always, 60)
    assert sweep.best() == sweep.find(C)
    assert {trial.tile for trial in sweep.trials if trial.wrong} == {A, B}
    assert all("with ragged lengths" in trial.fault for trial in sweep.trials if trial.wrong)
    assert tune.say_best(sweep) == 4


def test_a_sweep_without_a_confirmed_tile_gives_no_tuning() -> None:
    unsure = Sweep(tuned="latent-16", facts={})
    unsure.put(Trial(tile=A, us={"a": 1.0}))
    with pytest.raises(trials.NothingMeasured, match="timed and confirmed for latent-16"):
        trials.chosen(SMALL, {**SWEEPS, "latent-16": unsure})
    assert tune.say_best(unsure) == 3


def test_rows_that_are_not_written_are_wrong(tmp_path: Path) -> None:
    def forgetful(tile: Tile, launcher: Launcher, out: torch.Tensor) -> None:
        out[0, 0] = torch.nan

    sweeping, sweep = tuner(Device(forgetful), tuned(A, changes=()), tmp_path / "x.json")
    sweeping.run(always, 60)
    assert all(trial.wrong and trial.fault.startswith("wrong by inf") for trial in sweep.trials)


def test_a_sweep_that_was_cut_goes_on_and_tries_nothing_twice(tmp_path: Path) -> None:
    tiles, path = tuned(A, B, C, D), tmp_path / "x.json"
    left = itertools.chain([60.0, 50.0, 10.0], itertools.repeat(0.0))
    sweeping, sweep = tuner(Device(), tiles, path)
    assert sweeping.run(lambda: next(left), 60) == 2 + 2 * 2, "two tiles, and the other two in two ways"
    assert {trial.tile for trial in sweep.trials} == {None, A, B}, "no time was left for changes"
    path.write_bytes(path.read_bytes().replace(b'"fault": ""', b'"fault": "kept"', 1))
    device = Device()
    sweeping, sweep = tuner(device, tiles, path)
    assert sweeping.run(always, 60) == 0
    assert [trial.fault for trial in sweep.trials].count("kept") == 1
    changed = {replace(tile, **change) for tile in (A, B, C) for change in (TWO, WHOLE)}
    assert {trial.tile for trial in sweep.trials} == {None, A, B, C, D, *changed}
    tried, clock = len(sweep.trials), device.now
    assert tuner(device, tiles, path)[0].run(always, 60) == 0
    assert (len(trials.read(path).trials), device.now) == (tried, clock), "changed tiles are none of the best"


def test_a_tile_that_ended_the_process_is_not_tried_again(tmp_path: Path) -> None:
    def deadly(tile: Tile, launcher: Launcher, out: torch.Tensor) -> None:
        if tile == B:
            raise KeyboardInterrupt  # as good as abort(): nothing catches it

    path = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt):
        tuner(Device(deadly), tuned(A, B, C), path)[0].run(always, 60)
    sweeping, sweep = tuner(Device(deadly), tuned(A, B, C), path)
    assert sweeping.run(always, 60) == 0
    assert {trial.tile for trial in sweep.trials if trial.fault} == {B}
    assert [trial.fault for trial in sweep.trials if trial.tile == B] == [trials.BROKE_OFF]


def test_times_of_another_stack_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    old = Sweep(tuned="latent-16", facts={"card": "X", "date": "before"})
    old.put(Trial(tile=A, us={"a": 1.0}))
    trials.save(old, path)
    assert trials.opened(path, "latent-16", {"card": "X", "date": "today"}).trials
    assert not trials.opened(path, "latent-16", {"card": "X", "triton": "3.9"}).trials


def sweep(name: str, *times: tuple[Tile | None, float], **facts: str) -> Sweep:
    kept_sweep = Sweep(tuned=name, facts={"card": "Card 1", "torch": "2.14", **facts})
    for tile, us in times:
        kept_sweep.put(Trial(tile=tile, us={"a": us, "b": us}, confirmed=True))
    return kept_sweep


B2 = replace(B, **TWO)
SWEEPS = {
    "latent-16": sweep("latent-16", (None, 30.0), (A, 10.0), (B, 11.0), (B2, 9.0)),
    "latent-64": sweep("latent-64", (C, 30.0), (A, 20.0), (replace(A, **WHOLE), 25.0)),
    "latent-128": sweep("latent-128", (replace(D, **WHOLE), 40.0)),
    "expanded-64": sweep("expanded-64", (D, 50.0), (A, 60.0)),
    "expanded-128": sweep("expanded-128", (B, 70.0)),
}
SMALL = [tiles for tiles in SMOKE if not tiles.name.endswith("-128")]


def test_small_and_large_calls_alike_get_their_own_fastest_tile() -> None:
    best = trials.chosen(SMALL, SWEEPS)
    assert {name: trial.tile for name, trial in best.items()} == {
        "latent-16": B2, "latent-64": A, "expanded-64": D,
    }  # fmt: skip
    tuning = trials.tuning_of(SMALL, best)
    assert (dict(tuning.latent), dict(tuning.expanded)) == ({1: B2, 33: A}, {1: D})


def test_decode_is_also_tried_with_other_programs_and_whole_latents_and_prompts_are_not() -> None:
    for tiles in FULL:
        changed = {(tile.programs, tile.halves) for tile in tiles.finalists(tiles.tiles[:2])}
        latent = tiles.kind == "latent"
        assert changed == ({(1, True), (3, True), (4, True), (2, False)} if latent else set())
        assert {tile.programs for tile in tiles.tiles} == {2 if latent else 1}


def test_a_class_without_a_time_or_of_other_versions_gives_no_tuning() -> None:
    short = {name: sweep for name, sweep in SWEEPS.items() if name != "expanded-64"}
    with pytest.raises(trials.NothingMeasured, match="no tile was timed and confirmed for expanded-64: "):
        trials.chosen(SMALL, short)
    with pytest.raises(trials.NothingMeasured, match="different cards or versions"):
        trials.chosen(SMALL, {**SWEEPS, "expanded-64": sweep("expanded-64", (D, 50.0), triton="3.9")})
    assert [row[:2] for row in trials.table(SMALL, short)] == [
        ["latent-16, from 1 rows", str(B2)],
        ["latent-64, from 33 rows", str(A)],
    ]


def test_the_file_is_what_a_plugin_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, sweep in SWEEPS.items():
        trials.save(sweep, tmp_path / f"card-{name}.json")
    target = tmp_path / "tuning" / "card-1.json"
    folders = ["--sweeps", str(tmp_path), "--out", str(target.parent)]
    words = ["choose", "--backend", "acme", "--smoke", *folders]
    assert tune.tune(words, standalone_mode=False) == 0
    read = read_tuning(target)
    assert dict(read.latent) == {1: B2, 33: A, 65: replace(D, **WHOLE)}, "every class has its own programs"
    assert dict(read.expanded) == {1: D, 65: B}
    assert read.source.startswith("card-1.json: Card 1 (crc32 ")
    assert json.loads(target.read_bytes())["torch"] == "2.14"
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        f"use it with: -O tuning={target}",
        "ship it as: plugins/acme/mla_backend_acme/tuning/card-1.json",
    ]
    assert said[1].split()[-6:] == ["2", "programs", "9.0", "30.0", "3", "0"]
    assert tune.tune(words, standalone_mode=False) == 0, "the tuning itself is no sweep"
    assert trials.usage(target, "some.module:Backend", "Card 1") == said[-2], "a module has no such folder"


def test_a_backend_without_these_ops_is_refused() -> None:
    device: Any = SimpleNamespace(name="cpu", ops=dict, device=CPU)
    with pytest.raises(UnsupportedOps, match="offers no triton_latent: there is nothing to tune"):
        tune.check_served(device, classes(smoke=True)["latent-16"])


@pytest.mark.parametrize("kind", ["latent", "expanded"])
@pytest.mark.parametrize("every", [FULL, SMOKE], ids=["full", "smoke"])
def test_every_row_count_has_a_class_and_every_class_is_measured_with_rows_of_its_own(
    every: tuple[TileClass, ...], kind: str
) -> None:
    those = [tiles for tiles in every if tiles.kind == kind]
    ends = [tiles.least for tiles in those[1:]] + [10**9]
    assert those[0].least == 1
    for tiles, end in zip(those, ends, strict=True):
        rows = [shape.queries * (shape.heads if kind == "latent" else 1) for shape in tiles.shapes]
        assert all(tiles.least <= count < end for count in rows)
        assert len(set(tiles.tiles)) == len(tiles.tiles) > 0


def test_devices_with_little_shared_memory_and_registers_find_a_tile() -> None:
    latent = {tile for tiles in FULL if tiles.kind == "latent" for tile in tiles.tiles}
    assert Tile(16, 16, 4, 1, programs=2) in latent
    assert not {tile for tile in latent if tile.rows == 64 and tile.warps == 4}
