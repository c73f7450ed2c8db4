"""How keys are split over programs: every device is filled, and nothing takes more memory than it may."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_backends.triton_ops.attention import MAX_SPLITS, MIN_PART_KEYS, PARTS_BYTES, Splits, _Load, split
from mla_backends.triton_ops.tuning import Tile

SMALL, LARGE = Tile(16, 32, 4, 2, programs=2), Tile(64, 64, 8, 2)
ROW = 4 * 512  # bytes of a part of a row


def parts(keys: int, splits: Splits) -> int:
    """What the kernels derive from a length."""
    return min(max(-(-keys // splits.keys_per_split), 1), splits.max_splits)


def chosen(
    heads: int, kv_lens: list[int], tile: Tile = SMALL, processors: int = 132, room: int = 0
) -> Splits:
    capacity = -(-max(kv_lens) // 64) * 64 + room
    return split([heads] * len(kv_lens), kv_lens, capacity, ROW, tile, processors)


@pytest.mark.parametrize("length", [16384, 65536])
@pytest.mark.parametrize(("heads", "tile"), [(16, SMALL), (128, LARGE)])
def test_one_long_request_fills_the_device(heads: int, tile: Tile, length: int) -> None:
    splits = chosen(heads, [length], tile)
    programs = -(-heads // tile.rows) * parts(length, splits)
    assert programs >= 0.6 * min(132 * tile.programs, MAX_SPLITS, length // MIN_PART_KEYS)


@pytest.mark.parametrize("batch", [264, 528, 1024])
def test_a_batch_that_fills_the_device_is_not_split(batch: int) -> None:
    """And needs no merge, as long as the table is not wider than its lengths."""
    assert chosen(16, [4096] * batch).max_splits == 1


@pytest.mark.parametrize("batch", [67, 133, 140])
def test_a_little_more_than_a_wave_is_not_left_to_run_alone(batch: int) -> None:
    """One request more than the device takes at a time costs nothing like twice the time."""
    tile = Tile(16, 32, 4, 2)
    splits = chosen(16, [4096] * batch, tile)
    count = parts(4096, splits)
    waves = -(-batch * count // 132)
    assert waves * 4096 / count < 1.5 * batch * 4096 / 132


def test_a_long_request_among_short_ones_is_split_and_they_are_not() -> None:
    splits = chosen(16, [100] * 31 + [60_000])
    assert parts(100, splits) == 1
    assert parts(60_000, splits) > 50


def test_short_requests_are_not_worth_a_merge() -> None:
    assert chosen(16, [MIN_PART_KEYS] * 2).max_splits == 1


def test_a_merge_costs_more_with_more_parts() -> None:
    load = _Load([1], [8192], 8192, True, 1, 8192)
    merges = [load.cost(8192 // count, 10_000) - 8192 // count for count in (32, 33, 64, 256)]
    assert merges[0] < merges[1] == merges[2] < merges[3]


def test_lengths_that_grow_a_little_do_not_begin_another_wave() -> None:
    """As in a graph, whose table is wider than the lengths it was captured with."""
    for batch in (16, 60, 264):
        splits = chosen(16, [8000] * batch, room=8000)
        waves = [-(-batch * parts(length, splits) // 264) for length in (8000, 8100, 8200, 8300)]
        assert len(set(waves)) == 1


def test_a_wide_table_does_not_multiply_programs() -> None:
    """What a graph may grow to is far more than it was planned with: 128k tokens, not 4k."""
    splits = chosen(16, [4096] * 128, room=124 * 1024)
    assert splits.max_splits * 128 <= 8 * 264


@pytest.mark.parametrize(("heads", "short"), [(128, 255), (16, 2047), (128, 60)])
def test_a_long_request_among_very_many_rows_takes_a_bounded_memory(heads: int, short: int) -> None:
    """Every row has room for as many parts as the longest request: unbounded, this would take gigabytes."""
    splits = chosen(heads, [100] * short + [128 * 1024])
    taken = (short + 1) * heads * ROW * splits.max_splits
    assert PARTS_BYTES / 2 < taken <= PARTS_BYTES


lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 200_000)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=200)
@given(lengths, st.sampled_from([1, 16, 128]), st.sampled_from([SMALL, LARGE]), st.integers(1, 200))
def test_any_batch(requests: list[tuple[int, int]], heads: int, tile: Tile, processors: int) -> None:
    rows, kv_lens = [queries * heads for queries, _ in requests], [keys for _, keys in requests]
    capacity = max(1, -(-max(kv_lens) // 64)) * 64
    splits = split(rows, kv_lens, capacity, ROW, tile, processors)
    assert splits.keys_per_split >= min(MIN_PART_KEYS, capacity)
    assert 1 <= splits.max_splits <= MAX_SPLITS
    assert splits.max_splits == 1 or sum(rows) * splits.max_splits * ROW <= PARTS_BYTES
    for keys in kv_lens:  # the kernels' own rule leaves no key out
        count = parts(keys, splits)
        share = -(-keys // count)
        length = -(-share // tile.keys) * tile.keys
        assert count * length >= keys
