"""Output buffers: one per forward, poisoned, and a fair choice where there are too few."""

from __future__ import annotations

from collections import Counter

import pytest

from mla.bench.subjects.base import SHELF_BYTES, Shelf, buffers


class Buffer:
    """Remembers what it holds."""

    holds: int | None = 0


def poison(buffer: Buffer) -> None:
    buffer.holds = None


def run(shelf: Shelf[Buffer], forwards: int, seed: int = 0) -> dict[int, int | None]:
    """Run a pass of forwards that write their number, and return what is kept of each."""
    shelf.clear(seed)
    for index in range(forwards):
        buffer = shelf.next()
        assert buffer.holds is None, "poisoned before every forward"
        assert all(buffer is not kept for kept in shelf.kept.values())
        buffer.holds = index
        shelf.keep(index)
    return {index: buffer.holds for index, buffer in shelf.kept.items()}


@pytest.mark.parametrize("room", [5, 6])
def test_all_outputs_are_kept_where_there_is_room(room: int) -> None:
    shelf = Shelf([Buffer() for _ in range(room)], 5, poison)
    for _ in range(2):
        assert run(shelf, 5) == {index: index for index in range(5)}


def test_fewer_buffers_keep_what_the_forward_wrote_that_they_stand_for() -> None:
    shelf = Shelf([Buffer() for _ in range(4)], 50, poison)
    for seed in range(20):
        held_by_index = run(shelf, 50, seed)
        assert len(held_by_index) == 3
        assert all(index == held for index, held in held_by_index.items())


def test_every_forward_is_as_likely_to_be_kept() -> None:
    shelf = Shelf([Buffer() for _ in range(4)], 12, poison)
    counted = Counter(index for seed in range(2000) for index in run(shelf, 12, seed))
    assert set(counted) == set(range(12))
    assert all(400 < count < 600 for count in counted.values())  # 500 each, within 5 standard deviations


def test_the_number_of_buffers_is_bounded_by_memory_and_at_least_three() -> None:
    assert buffers(100, 1000) == 100
    assert buffers(100, SHELF_BYTES // 7) == 7
    assert buffers(100, SHELF_BYTES) == buffers(100, 5 * SHELF_BYTES) == 3
    assert [buffers(wanted, 10 * SHELF_BYTES) for wanted in (1, 2, 3)] == [1, 2, 3]


def test_two_forwards_of_a_pass_are_judged_where_memory_is_short() -> None:
    """The sizes that the method's page names."""
    for size, judged in ((64 << 20, 3), ((64 << 20) + 1, 2), (1 << 40, 2)):
        shelf = Shelf([Buffer() for _ in range(buffers(50, size))], 50, poison)
        assert len(run(shelf, 50)) == judged
