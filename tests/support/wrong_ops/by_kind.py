"""Small ops that fail as kernels do, by kind of failure: the check that must fail, a maker, and a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mla_backends.api import FusedOp
from wrong_ops import extents, habits, numerics, places
from wrong_ops.base import SMALL_OPS, as_contiguous, changing

Make = Callable[[], FusedOp]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PRODUCTS, HEADED = ("linear", "batched_linear"), ("batched_linear", "rotate_query")
WITH_OUT = SMALL_OPS[:-1]


def each(kinds: tuple[str, ...], check: str, mutant: Any, *numbers: Any) -> Iterator[tuple[str, Make, str]]:
    """Yield check, a function that makes the mutant, and a name, for every kind and number."""
    for kind in kinds:
        for number in numbers:
            words = number if isinstance(number, tuple) else (number,)
            name = f"{kind}-{mutant.__name__}-{'-'.join(map(str, words))}"
            yield f"{kind}.{check}", lambda k=kind, w=words: mutant(k, *w), name


def write(check: str, mutant: Any, *numbers: Any) -> Iterator[tuple[str, Make, str]]:
    """Yield the same for mutants of write_latent."""
    for number in numbers or ((),):
        words = number if isinstance(number, tuple) else (number,)
        name = f"{mutant.__name__}-{'-'.join(map(str, words))}"
        yield f"write_latent.{check}", lambda w=words: mutant(*w), name


def norm(check: str, mutant: Any, *numbers: int) -> Iterator[tuple[str, Make, str]]:
    for number in numbers:
        yield f"rms_norm.{check}", lambda n=number: mutant(n), f"{mutant.__name__}-{number}"


GRID = [
    *each(SMALL_OPS, "rows", extents.lost_from, 1, 300, 800, 1024, 4100),
    *each(("rms_norm",), "rows", extents.lost_from, 65_535),
    *each(SMALL_OPS, "rows", extents.lost_at, 17, 256, 1024),
    *each(SMALL_OPS, "rows", extents.lost_rest, (16, 9), (32, 1), (64, 0)),
    *each(("linear",), "rows", extents.biased_wrong, (30, 0), (160, 0), (4097, 0)),
    *each(("rotate_query", "write_latent"), "rows", extents.halves_lost_from, 8, 16, 1024),
    *each(HEADED, "rows_and_heads", extents.lost_blocks, 65535, 1 << 14),
    *each(("linear",), "wide", extents.lost_outputs_from, 2048, 4096, 32768),
    *each(("linear",), "wide", extents.biased_wrong, (0, 1024), (2, 24576)),
]
TILES = [
    *each(HEADED, "heads", extents.lost_heads, (16, 9), (8, 6), (32, 31), (128, 0)),
    *each(HEADED, "heads", extents.lost_heads_from, 8, 32, 64, 100),
    *each(("rotate_query",), "heads", extents.halves_lost_heads, 16, 64, 127),
    *each(PRODUCTS, "widths", extents.lost_outputs, (16, 15), (64, 1), (256, 0)),
    *each(("linear",), "widths", extents.biased_wrong, (0, 128), (0, 31)),
    *each(("rotate_query",), "widths", extents.lost_channels_from, 64, 32, 2),
    *each(("rotate_query",), "widths", extents.lost_outputs, (32, 30), (64, 32)),
    *each(PRODUCTS, "widths", extents.lost_inputs, 16, 32, 64, 128),
    *norm("widths", extents.padded_mean, 16, 64, 512),
    *write("widths", extents.lost_channels, 512, 576),
]
INDEX = [
    *write("slots", places.narrow_slots, 8, 11, 13, 14, 15, 16),
    *write("slots", places.lost_slots, 3000, 40000, 65537),
    *write("slots", places.narrow_pages, 8, 10, 15),
    *write("far_slots", places.narrow_slots, 9, 12),
    *each(WITH_OUT, "far_rows", places.narrow_places, ("x", 20), ("x", 21), ("out", 21)),
    *each(("write_latent",), "far_rows", places.narrow_places, ("kv_a", 20), ("kv_a", 21)),
]
ORDER = [
    *write("order", places.sorted_slots),
    *write("order", places.run_of_slots, True, False),
    *each(("write_latent",), "order", extents.halves_lost_from, 1, 100),
]
STATE = [
    *each(SMALL_OPS, "earlier_outputs", habits.late_writer, 1, 2, 5),
    *each(PRODUCTS, "earlier_outputs", habits.packs_once, "shape"),
    *each(PRODUCTS, "earlier_outputs", habits.first_weight, "shape"),
    *each(PRODUCTS, "packed_again", habits.packs_once, "address", "shape"),
    *each(SMALL_OPS, "new_contents", habits.remembers_result, ()),
    *each(WITH_OUT, "new_contents", habits.skips_finite, ()),
    *each(WITH_OUT, "new_contents", habits.remembers, "x"),
    *each(("write_latent",), "new_contents", habits.remembers, "kv_a", "weight", "cos_sin"),
    *each(("rotate_query",), "new_contents", habits.remembers, "cos_sin"),
    *each(("rms_norm",), "new_contents", habits.remembers, "weight"),
    *each(("linear",), "new_contents", habits.remembers, "bias"),
    *each(SMALL_OPS, "call_before", habits.adds_previous, 2e-3, 1e-3, 1e-4),
]
MEMORY = [
    *each(WITH_OUT, "inputs", places.rounds_rows_up, 4, 16, 64, 256),
    *each(WITH_OUT, "inputs", places.writes_before, 1, 16),
    *write("inputs", places.rounds_slots_up, 8, 32),
    *each(HEADED, "strided", places.packed_leading, "x"),
    *each(PRODUCTS, "strided", places.served_in_whole_tiles, 64, 128),
    *each(("linear",), "strided", extents.biased_wrong, (40, 0), (3, 64)),
    *each(("rotate_query", "write_latent"), "strided", extents.halves_lost_from, 7, 64),
    *(
        (
            f"{kind}.strided",
            lambda k=kind, n=name: changing(k, n, as_contiguous),
            f"{kind}-{name}",
        )
        for kind, names in (
            ("linear", ("x", "out")),
            ("batched_linear", ("x", "out")),
            ("rms_norm", ("x", "out")),
            ("rotate_query", ("x", "cos_sin", "out")),
            ("write_latent", ("kv_a", "cos_sin")),
        )
        for name in names
    ),
]
EMPTY = [*each(SMALL_OPS, "empty", places.writes_if_empty, 1, 16)]
NUMBERS = [
    *each(PRODUCTS, "long_sums", numerics.narrow_sums, (64, BF16), (256, BF16), (32, FP16)),
    *each(PRODUCTS, "long_sums", numerics.split_sums, 2, 4, 8),
    *norm("long_sums", numerics.narrow_squares, 32, 64),
    *each(("linear", "batched_linear", "rotate_query"), "sizes", numerics.eight_bits, "call"),
    *each(SMALL_OPS, "sizes", numerics.flushes_small, 2**-8, 2**-10),
    *each(PRODUCTS, "outlier", numerics.eight_bits, "row", "call"),
]
KINDS = {
    "grid": GRID,
    "tiles": TILES,
    "index": INDEX,
    "order": ORDER,
    "state": STATE,
    "memory": MEMORY,
    "emptiness": EMPTY,
    "numbers": NUMBERS,
}
