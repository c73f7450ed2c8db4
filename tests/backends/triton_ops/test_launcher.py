"""The launcher: which tile runs where the device lacks resources, and what it says of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from mla_backends.kernels import KernelRefused
from mla_backends.triton_ops.launcher import Launcher, lacks_resources, on_device
from mla_backends.triton_ops.tuning import Tile

WANTED = Tile(64, 64, 8, 3)


class OutOfResources(Exception):
    """Named like Triton's."""


class Device:
    """Starts tiles whose rows times keys times stages it has room for."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.tried: list[Tile] = []

    def __call__(self, tile: Tile) -> None:
        self.tried.append(tile)
        if tile.rows * tile.keys * tile.stages > self.room:
            raise OutOfResources("out of resource: shared memory, Required: 9, Hardware limit: 8.")


def launch(device: Any, launcher: Launcher | None = None, PAGE: int = 64) -> None:
    arguments = {"out": torch.zeros(1), "PAGE": PAGE, "rows": 3}
    (launcher or Launcher()).start_tiled("attention", WANTED, arguments, ("PAGE",), device)


def test_a_tile_that_fits_is_tried_alone() -> None:
    launcher, device = Launcher(), Device(10**9)
    for _ in range(2):
        launch(device, launcher)
    assert device.tried == [WANTED] * 2
    assert launcher.remarks == []


def test_a_smaller_tile_is_found_once_and_said() -> None:
    launcher, device = Launcher(), Device(64 * 16 * 3)
    launch(device, launcher)
    assert device.tried == [WANTED, Tile(64, 32, 8, 3), Tile(64, 16, 8, 3)]
    launch(device, launcher)
    assert device.tried[3:] == [Tile(64, 16, 8, 3)]
    (said,) = launcher.remarks
    assert said.startswith("attention (page 64) runs with 64 rows x 16 keys")
    assert "as 64 rows x 64 keys, 8 warps, 3 stages, halves does not fit this device" in said
    assert "shared memory" in said


def test_what_fits_one_variant_need_not_fit_another() -> None:
    launcher, small, large = Launcher(), Device(64 * 16 * 3), Device(10**9)
    launch(small, launcher, PAGE=64)
    launch(large, launcher, PAGE=1)
    assert large.tried == [WANTED]
    large.room = 64 * 32 * 3  # as a later call of the same variant may need more
    launch(large, launcher, PAGE=1)
    assert large.tried[1:] == [WANTED, Tile(64, 32, 8, 3)]


def test_a_device_without_room_for_any_tile_is_refused_with_the_first_reason() -> None:
    device = Device(0)
    with pytest.raises(KernelRefused, match=r"does not fit this device in any tile .*Required: 9"):
        launch(device)
    assert device.tried[-1].warps == 1
    assert len(set(device.tried)) == len(device.tried)


def test_other_errors_are_no_lack_of_resources() -> None:
    def broken(tile: Tile) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch(broken)


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (OutOfResources("out of resource: threads"), True),
        (type("PTXASError", (Exception,), {})("entry function uses too much shared data"), True),
        (type("PTXASError", (Exception,), {})("Value 'sm_130' is not defined for option 'gpu-name'"), False),
        (RuntimeError("Cannot find ptxas"), False),
        (RuntimeError("Triton Error [CUDA]: too many resources requested for launch"), True),
        (RuntimeError("local memory (LDS) of 81920 exceeds 65536"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False),
        (ValueError("shared memory"), False),
    ],
)
def test_what_is_a_lack_of_resources(error: Exception, lacks: bool) -> None:
    assert lacks_resources(error) is lacks


def test_tiles_shrink_by_keys_first_and_never_grow_back_but_in_a_smaller_one() -> None:
    """One stage may need more shared memory than two of the same tile, so stages go after keys."""
    chain = [WANTED, *WANTED.smaller()]
    assert chain[1:3] == [Tile(64, 32, 8, 3), Tile(64, 16, 8, 3)]
    assert chain[-1] == Tile(16, 16, 1, 1)
    for before, after in pairwise(chain):
        assert after.rows <= before.rows
        assert after.warps <= before.warps
        assert (after.rows, after.warps) != (before.rows, before.warps) or after.keys <= before.keys


class Kernel:
    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.calls: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(**arguments: Any) -> None:
            self.calls.append((grid, arguments))
            if self.fails:
                raise OutOfResources

        return launch


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_a_launch_may_start_early_but_in_an_interpreter(
    interpreted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    kernel, out, cards = Kernel(), torch.zeros(2, 8), (Launcher(), Launcher(early=True))
    for launcher in cards:
        launcher.start(kernel, (1,), {"out": out, "EARLY": launcher.early})
    assert ["launch_pdl" in arguments for _, arguments in kernel.calls] == [False, interpreted == "0"]


@pytest.mark.parametrize(
    ("tile", "expected"),
    [
        (Tile(64, 64, 8, 2, halves=False), Tile(64, 32, 8, 3, halves=False)),
        (Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
        (Tile(16, 16, 2, 2, halves=False), Tile(16, 16, 4, 2)),
        (Tile(64, 16, 8, 2), Tile(64, 16, 8, 2)),
        (Tile(64, 16, 8, 1, halves=False), Tile(32, 16, 8, 1)),
    ],
    ids=str,
)
def test_steps_over_several_pages_take_a_tile_of_fewer_registers(tile: Tile, expected: Tile) -> None:
    assert tile.across_pages() == expected


@pytest.mark.parametrize(
    ("tile", "parts", "expected"),
    [
        (Tile(16, 64, 4, 2, halves=False, programs=2), False, Tile(16, 64, 8, 2)),
        (Tile(64, 64, 8, 2, halves=False), False, Tile(64, 64, 8, 2)),
        (Tile(64, 16, 8, 2), False, Tile(64, 16, 8, 1)),
        (
            Tile(64, 32, 8, 2, halves=False, spread=False),
            False,
            Tile(64, 16, 8, 1, halves=False, spread=False),
        ),
        (Tile(64, 64, 8, 2, halves=False), True, Tile(16, 32, 8, 2)),
        (Tile(64, 64, 8, 2, spread=False), True, Tile(16, 16, 4, 2, spread=False)),
        (Tile(16, 16, 4, 1), True, Tile(16, 16, 4, 1)),
        (Tile(16, 16, 4, 1), False, Tile(16, 16, 4, 1)),
    ],
    ids=str,
)
def test_caches_of_bytes_take_a_tile_that_decodes_in_registers(
    tile: Tile, parts: bool, expected: Tile
) -> None:
    assert tile.of_bytes(parts) == expected


@pytest.mark.parametrize(("warps", "programs", "most"), [(4, 1, 255), (8, 1, 255), (4, 8, 64), (8, 2, 128)])
def test_registers_are_bounded_by_the_programs_that_must_fit(warps: int, programs: int, most: int) -> None:
    kernel, out = Kernel(), torch.zeros(1)
    for launcher in (Launcher(), Launcher(bounds=True)):
        launcher.start(kernel, (1,), {"out": out}, warps=warps, programs=programs)
    assert [arguments.get("maxnreg") for _, arguments in kernel.calls] == [None, most]


def test_the_device_of_the_output_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton starts kernels on the current device, wherever the tensors are."""
    entered: list[int] = []

    class Guard:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    for index in (0, 1):
        with on_device(torch.device("cuda", index)):
            pass
    assert entered == [1]
