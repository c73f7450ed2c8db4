"""Which footprints `ceilings` measures."""

from __future__ import annotations

import pytest

from mla.bench.run.ceilings import footprints


@pytest.mark.parametrize(
    ("cache", "free", "powers"),
    [
        (32 << 20, None, [18, 20, 22, 24, 26, 27]),  # 4 caches are 128 MiB
        (1 << 20, None, [18, 20, 22]),
        (None, None, [18, 20, 22, 24, 26, 28, 30]),
        (32 << 20, 40 << 20, [18, 20, 22, 23]),  # a quarter of memory is 10 MiB
        (60 << 20, 1 << 40, [18, 20, 22, 24, 26, 27]),
        (260 << 20, 1 << 40, [18, 20, 22, 24, 26, 28, 30]),
        (1, 1, [18]),
    ],
)
def test_footprints_reach_from_the_smallest_beyond_the_cache(
    cache: int | None, free: int | None, powers: list[int]
) -> None:
    assert footprints(cache, free) == [1 << power for power in powers]
