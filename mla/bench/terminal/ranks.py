"""Print what each rank of a case did. Reads results only, so it needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mla.bench.results.schema import Case, RankFacts, Spread
from mla.bench.results.stats import median
from mla.command.table import aligned, markdown
from mla.parallel.link import IDEAL, Link
from mla.text import size

_HEADER = ("ms", "collectives ms", "sent", "cache", "weights")

Number = Callable[[float | None], str]


def render(cases: Sequence[Case], kind: str, number: Number) -> str:
    """Return a table of ranks for every case that has some; "" if none has. `kind` is "table" or "md"."""
    return "".join(_case(case, case.spread, kind, number) for case in cases if case.spread)


def imbalance(spread: Spread) -> float:
    """Return how much longer the busiest rank works than all do on average, collectives left out."""
    busy = [max(0.0, median(one.samples) - one.collective_ms) for one in spread.ranks]
    average = sum(busy) / len(busy)
    return max(busy) / average - 1 if average else 0.0


def _case(case: Case, spread: Spread, kind: str, number: Number) -> str:
    title = f"ranks of {case.scenario}, {case.implementation}"
    rows = [(str(one.rank), *_row(one, number)) for one in _shown(spread)]
    if kind == "md":
        table = markdown((title, *_HEADER), rows)
    else:
        table = aligned((title, *_HEADER), rows, words=(title,))
    if spread.predicted:
        return f"{table}\n{prediction(spread, number)}\n\n"
    return (
        f"{table}\n{spread.layout} over {spread.library}; imbalance {imbalance(spread):.0%}. The latency is "
        "that of the slowest rank, forward by forward; collectives\nwere clocked in a pass of their own, and "
        "hold the wait for other ranks.\n\n"
    )


def _shown(spread: Spread) -> Sequence[RankFacts]:
    """Return the ranks of the table; of a prediction, those that stand for all that are alike."""
    return [one for one in spread.ranks if not spread.predicted or one.rank in spread.timed_ranks]


def prediction(spread: Spread, number: Number) -> str:
    """Return how a prediction came about: what was run, and what was added."""
    count, timed = len(spread.ranks), len(spread.timed_ranks)
    alike = f"; {count - timed} more are like one of these" if timed < count else ""
    return (
        f"{spread.layout}, predicted: {count} ranks ran one after the other on one device, and their outputs "
        f"were merged; {timed} {'was' if timed == 1 else 'were'}\ntimed alone{alike}. Slowest share "
        f"{number(spread.compute_ms)} ms, to which collectives are added; imbalance "
        f"{imbalance(spread):.0%}.\nLink {_link(spread)}."
    )


def _link(spread: Spread) -> str:
    """Return the link, and where it is from."""
    if not spread.link:
        return f"{IDEAL} ({spread.link_source}), so this is a lower bound"
    return f"{Link({one.collective: one.line() for one in spread.link})} ({spread.link_source})"


def _row(one: RankFacts, number: Number) -> tuple[str, ...]:
    return (
        number(median(one.samples)),
        number(one.collective_ms),
        size(one.collective_bytes),
        size(one.cache_bytes),
        size(one.weight_bytes),
    )
