"""Tables of ranks, of stages and of two runs, for the terminal and the page.

Results alone are read, so torch is not needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from mla.bench.results import compare
from mla.bench.results.cases import imbalances, repeated
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Case, Interval, RankFacts, Roofline, Run, Spread, Stage
from mla.bench.results.stats import median
from mla.bench.terminal.digits import estimated, limit, number, per_second, percent
from mla.bench.terminal.lines import name
from mla.command.display import aligned, has_colours, markdown
from mla.parallel.layout import IDEAL, Link
from mla.text import grouped, size
from mla_backends.outside import escaped

NAMES = ("scenario", "implementation")
# Columns that hold words, in any table.
WORDS = (*NAMES, "stage", "verdict")
COMPARED = (*NAMES, "base median ms", "new median ms", "time ratio", "90% CI", "verdict")
RANKS = ("rank", "ms", "collectives ms", "imbalance", "sent", "cache", "weights")
STAGES = ("stage", "ms", "share %", "FLOP/s", "GB/s", "% of limit")
MEASURED_RANKS = (
    "A latency is the slowest rank's, forward by forward. Collectives were clocked in a pass of their\n"
    "own, and hold the wait for other ranks. Imbalance is against the median rank, collectives left out: as\n"
    "these are of another pass, a few percent mean nothing. Measured limits are rank 0's."
)
# Most cases that a remark about many names.
MAX_NAMED = 3
# Colours of a row on a terminal, by its mark.
_STYLES = {"wrong": "red", "doubtful": "magenta"}


class Table(NamedTuple):
    """Rows of cells below a title, and notes below them; columns titled one of `words` are aligned left.

    `marks` colour rows, by place: on the page they are CSS classes, and `remarks` stand below some rows.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    words: Collection[str] = WORDS
    marks: Sequence[str] = ()
    remarks: Sequence[str] = ()

    def text(self, kind: str) -> str:
        """Return all of it as plain text, or as Markdown for the kind "md", ending in a newline."""
        body = ""
        if self.rows or not self.notes:
            styles = [_STYLES.get(mark, "") for mark in self.marks] if self.marks and has_colours() else None
            plain = aligned(self.head, self.rows, self.words, styles=styles)
            body = markdown(self.head, self.rows) if kind == "md" else plain
        return "\n\n".join(filter(None, (self.title, body.rstrip("\n"), "\n".join(self.notes)))) + "\n"


def bounds(interval: Interval | None, places: int = 3) -> str:
    """Return "low .. high" with as many decimal places; "-" for None."""
    return f"{interval[0]:.{places}f} .. {interval[1]:.{places}f}" if interval else "-"


# ------------------------------------------------------------------------------------------------ two runs


def compared(base: Run, run: Run, title: str, noise: float = compare.NOISE) -> tuple[Table, list[Comparison]]:
    """Return the table of a run compared with the base, with what else there is to say, and all its cases."""
    cases = compare.compare(base, run, noise)
    rows, notes = list(map(_compared, cases)), [f"warning: {each}" for each in compare.warnings(base, run)]
    remarks = grouped((case for case in cases if case.remarks), lambda case: case.remarks)
    if len(cases) > 1 and all(case.verdict == compare.REFUSED for case in cases):
        reasons = "; ".join(f"{why} ({len(same)})" for why, same in remarks.items())
        rows, remarks = [], {}
        notes.append(f"none of {len(cases)} cases can be compared: {reasons}")
        for which, argv in (("base", base.argv), ("new", run.argv)):
            notes.append(f"the {which} run was `{escaped(' '.join(argv))}`")
    for why, same in remarks.items():
        more = f" and {len(same) - MAX_NAMED} more" * (len(same) > MAX_NAMED)
        notes.append(f"{'; '.join(name(case) for case in same[:MAX_NAMED])}{more}: {why}")
    return Table(escaped(title), COMPARED, rows, notes), cases


def _compared(case: Comparison) -> tuple[str, ...]:
    ratio = "-" if case.ratio is None else f"{'' if case.interval else '~'}{case.ratio:.3f}"
    times = [estimated(of.latency_ms if of and case.ratio else None) for of in (case.base, case.new)]
    return (case.scenario, case.implementation, *times, ratio, bounds(case.interval), case.verdict)


# --------------------------------------------------------------------------------------------------- ranks


def ranks(cases: Iterable[Case]) -> list[Table]:
    """Return a table of ranks for every case that has some: of a prediction, of those that stand for all."""
    return [_ranks(case, case.spread) for case in cases if case.spread is not None]


def _ranks(case: Case, spread: Spread) -> Table:
    excesses = imbalances(spread)
    about = f"Imbalance {percent(max(excesses))}."
    if share := repeated(case):
        about += (
            f" Repeated on ranks: {percent(share.flops)} of all FLOPs, {percent(share.bytes)} of all bytes."
        )
    shown = spread.timed_ranks if spread.predicted else range(len(spread.ranks))
    of_ranks = zip(spread.ranks, excesses, strict=True)
    rows = [_rank(rank, excess) for rank, excess in of_ranks if rank.rank in shown]
    over = "" if spread.predicted else f" over {spread.library}"
    notes = [prediction(spread)] * spread.predicted + [about]
    return Table(f"ranks of {name(case)}: {spread.layout}{over}", RANKS, rows, notes)


def _rank(rank: RankFacts, excess: float) -> tuple[str, ...]:
    held = (size(count) for count in (rank.collective_bytes, rank.cache_bytes, rank.weight_bytes))
    times = number(median(rank.samples)), number(rank.collective_ms)
    return (str(rank.rank), *times, f"{100 * excess:+.0f} %", *held)


def prediction(spread: Spread) -> str:
    """Return how a prediction came about: what was run, and what was added."""
    count, timed = len(spread.ranks), len(spread.timed_ranks)
    alike = "; the others are like one of these" if timed < count else ""
    link = f"{IDEAL} ({spread.link_source}), so this is a lower bound"
    if spread.link:
        link = f"{Link({line.collective: line.line() for line in spread.link})} ({spread.link_source})"
    return (
        f"{spread.layout}, predicted: {timed} of {count} ranks ran alone, one after the other on one "
        f"device{alike}.\nSlowest share {number(spread.compute_ms)} ms, to which collectives are added.\n"
        f"Link {link}."
    )


# -------------------------------------------------------------------------------------------------- stages


def stages(cases: Iterable[Case]) -> list[Table]:
    """Return the stages of every case that has some; parts of a stage ("stage: part") are counted in it."""
    return [_stages(case) for case in cases if case.stages]


def _stages(case: Case) -> Table:
    sum_ms = sum(stage.ms for stage in case.stages if ": " not in stage.name)
    forward = number(case.latency_ms.median if case.latency_ms else None)
    note = (
        f"Each is timed alone, with a synchronization before and after: the sum is {number(sum_ms)} ms, a "
        f"forward takes {forward} ms."
    )
    note += " Bookkeeping is not part of a prefill's latency." * (case.mode == "prefill")
    rows = [_stage(stage, sum_ms) for stage in case.stages]
    return Table(f"stages of {name(case)}", STAGES, rows, [note])


def _stage(stage: Stage, sum_ms: float) -> tuple[str, ...]:
    cost = stage.cost
    return (
        stage.name,
        number(stage.ms),
        f"{100 * stage.ms / sum_ms:.1f}" if sum_ms else "-",
        per_second(_rate(cost.flops if cost else 0, stage.ms), ""),
        number(_rate(cost.bytes if cost else 0, stage.ms, 1e9)),
        limit(stage.roofline or Roofline()),
    )


def _rate(amount: int, ms: float, unit: float = 1.0) -> float | None:
    return amount / ms * 1e3 / unit if amount and ms else None
