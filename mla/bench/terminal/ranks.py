"""Print what each rank of a case did. Reads results only, so it needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.results.cases import imbalance, imbalances, repeated
from mla.bench.results.schema import Case, RankFacts, Spread
from mla.bench.results.stats import median
from mla.bench.terminal.digits import number, percent
from mla.command.table import table
from mla.parallel.link import IDEAL, Link
from mla.text import size

COLUMNS = ("rank", "ms", "collectives ms", "imbalance", "sent", "cache", "weights")
_MEASURED = (
    "A latency is that of the slowest rank, forward by forward. Collectives were clocked in a pass of their\n"
    "own, and hold the wait for other ranks. Imbalance is against the median rank, collectives left out: as\n"
    "these are of another pass, a few percent mean nothing. Measured limits are those of rank 0.\n\n"
)


def render(cases: Sequence[Case], kind: str) -> str:
    """Return a table of ranks for every case that has some; "" if none has. `kind` is "table" or "md"."""
    tables = "".join(_case(case, case.spread, kind) for case in cases if case.spread)
    measured = any(case.spread and not case.spread.predicted for case in cases)
    return tables + _MEASURED * measured


def rows(spread: Spread) -> list[tuple[str, ...]]:
    """Return what `COLUMNS` say of every rank; of a prediction, of those that stand for all."""
    every = zip(spread.ranks, imbalances(spread), strict=True)
    return [
        _row(one, excess) for one, excess in every if not spread.predicted or one.rank in spread.timed_ranks
    ]


def _case(case: Case, spread: Spread, kind: str) -> str:
    over = "" if spread.predicted else f" over {spread.library}"
    title = f"ranks of {case.scenario}, {case.implementation}: {spread.layout}{over}"
    found = rows(spread)
    about = f"{prediction(spread)}\n" * spread.predicted
    about += f"Imbalance {percent(imbalance(spread))}. {_repeated(case)}"
    return f"{title}\n\n{table(kind, COLUMNS, found)}\n{about}\n\n"


def _repeated(case: Case) -> str:
    found = repeated(case)
    if found is None:
        return ""
    return f"Repeated on ranks: {percent(found.flops)} of all FLOPs, {percent(found.bytes)} of all bytes."


def prediction(spread: Spread) -> str:
    """Return how a prediction came about: what was run, and what was added."""
    count, timed = len(spread.ranks), len(spread.timed_ranks)
    alike = f"; {count - timed} more are like one of these" if timed < count else ""
    return (
        f"{spread.layout}, predicted: {count} ranks ran one after the other on one device, and their outputs "
        f"were merged; {timed} {'was' if timed == 1 else 'were'}\ntimed alone{alike}. Slowest share "
        f"{number(spread.compute_ms)} ms, to which collectives are added.\nLink {_link(spread)}."
    )


def _link(spread: Spread) -> str:
    """Return the link, and where it is from."""
    if not spread.link:
        return f"{IDEAL} ({spread.link_source}), so this is a lower bound"
    return f"{Link({one.collective: one.line() for one in spread.link})} ({spread.link_source})"


def _row(one: RankFacts, excess: float) -> tuple[str, ...]:
    return (
        str(one.rank),
        number(median(one.samples)),
        number(one.collective_ms),
        f"{100 * excess:+.0f} %",
        size(one.collective_bytes),
        size(one.cache_bytes),
        size(one.weight_bytes),
    )
