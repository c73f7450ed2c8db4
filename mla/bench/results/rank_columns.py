"""What a flat table says of a case over ranks, a number each; None on one device. Needs no torch."""

from __future__ import annotations

from mla.bench.results.predicted import is_predicted
from mla.bench.results.schema import Case
from mla.bench.results.shares import imbalance, repeated
from mla.bench.results.stats import median

COLUMNS = (
    "layout",
    "ranks",
    "predicted",
    "collective_ms",
    "collective_bytes",
    "imbalance",
    "rank_cache_bytes",
    "rank_weight_bytes",
    "repeated_flops",
    "repeated_bytes",
)


def flat(case: Case) -> dict[str, str | int | float | bool | None]:
    """Return `COLUMNS`: collectives of the median rank, and the most bytes that any rank sends or holds."""
    spread, again = case.spread, repeated(case)
    if spread is None:
        return dict.fromkeys(COLUMNS) | {"predicted": False}
    ranks = spread.ranks
    return {
        "layout": spread.layout,
        "ranks": len(ranks),
        "predicted": is_predicted(case),
        "collective_ms": median([one.collective_ms for one in ranks]),
        "collective_bytes": max(one.collective_bytes for one in ranks),
        "imbalance": imbalance(spread),
        "rank_cache_bytes": max(one.cache_bytes for one in ranks),
        "rank_weight_bytes": max(one.weight_bytes for one in ranks),
        "repeated_flops": again.flops if again else None,
        "repeated_bytes": again.bytes if again else None,
    }
