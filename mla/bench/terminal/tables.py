"""The tables beside that of a run: of ranks, of stages, of two runs, and of scaling over ranks.

Results alone are read, so torch is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.results import compare
from mla.bench.results.cases import imbalance, imbalances, repeated
from mla.bench.results.compare import Comparison, Scaled
from mla.bench.results.schema import Case, Interval, RankFacts, Roofline, Run, Spread, Stage
from mla.bench.results.stats import median
from mla.bench.terminal.digits import estimated, limit, number, per_second, percent
from mla.command.display import table
from mla.parallel.layout import IDEAL, Link
from mla.text import size
from mla_backends.outside import escaped

COMPARED = (
    "scenario",
    "implementation",
    "base median ms",
    "new median ms",
    "time ratio",
    "90% CI",
    "verdict",
)
SCALING_COLUMNS = ("latency ms", "speedup", "90% CI", "efficiency", "collectives ms", "repeated")
RANK_COLUMNS = ("rank", "ms", "collectives ms", "imbalance", "sent", "cache", "weights")
STAGE_COLUMNS = ("ms", "share %", "FLOP/s", "GB/s", "% of limit")
_MEASURED_RANKS = (
    "A latency is the slowest rank's, forward by forward. Collectives were clocked in a pass of their\n"
    "own, and hold the wait for other ranks. Imbalance is against the median rank, collectives left out: as\n"
    "these are of another pass, a few percent mean nothing. Measured limits are rank 0's.\n\n"
)
# Most cases that a remark about many names.
MAX_NAMED = 3


def bounds(interval: Interval | None, places: int = 3) -> str:
    """Return "low .. high" with as many decimal places; "-" for None."""
    return f"{interval[0]:.{places}f} .. {interval[1]:.{places}f}" if interval else "-"


# ------------------------------------------------------------------------------------------------ two runs


def compare_runs(
    base: Run, run: Run, title: str, kind: str, noise: float = compare.NOISE
) -> tuple[str, list[Comparison]]:
    """Return what to print about a run compared with the base, and all its cases."""
    cases = compare.compare(base, run, noise)
    lines = [escaped(title), *(f"warning: {warning}" for warning in compare.warnings(base, run)), ""]
    remarks: dict[str, list[str]] = {}
    for case in cases:
        remarks.setdefault(case.remarks, []).append(f"{case.scenario}, {case.implementation}")
    remarks.pop("", None)
    if len(cases) > 1 and all(case.verdict == compare.REFUSED for case in cases):
        reasons = "; ".join(f"{why} ({len(names)})" for why, names in remarks.items())
        lines.append(f"none of {len(cases)} cases can be compared: {reasons}")
        lines += [
            f"the {which} run was `{escaped(' '.join(ran.argv))}`"
            for which, ran in (("base", base), ("new", run))
        ]
        return "\n".join([*lines, ""]), cases
    text = "\n".join(lines) + "\n" + table(kind, COMPARED, map(compared_cells, cases), COMPARED)
    text += "\n" * bool(remarks)
    for why, names in remarks.items():
        more = f" and {len(names) - MAX_NAMED} more" * (len(names) > MAX_NAMED)
        text += f"{'; '.join(names[:MAX_NAMED])}{more}: {why}\n"
    return text, cases


def compared_cells(case: Comparison) -> tuple[str, ...]:
    """Return what `COMPARED` say of a case."""
    ratio = "-" if case.ratio is None else f"{'' if case.interval else '~'}{case.ratio:.3f}"
    times = map(estimated, case.times)
    return (case.scenario, case.implementation, *times, ratio, bounds(case.interval), case.verdict)


def scaling_tables(scalings: Sequence[Sequence[Scaled]], kind: str) -> str:
    """Return a table for every scenario that is there on ranks and on one device; "" if none is."""
    if not scalings:
        return ""
    units = "cores" if all(base.threads is not None for base, *_ in scalings) else "devices"
    text = f"strong scaling: speedup over the base; efficiency = speedup / {units} used\n"
    for base, *others in scalings:
        title = f"{base.case.scenario}, {base.case.implementation}"
        rows = [(row.layout, row.on, *scaling_cells(row)) for row in (base, *others)]
        text += "\n" + table(kind, (title, "on", *SCALING_COLUMNS), rows, (title, "on"))
        elsewhere = dict.fromkeys(row.device for row in others if row.device != base.device)
        if elsewhere:
            text += f"\nno efficiency on {', '.join(elsewhere)}: the base ran on {base.device}\n"
    return text


def scaling_cells(row: Scaled) -> tuple[str, ...]:
    """Return what `SCALING_COLUMNS` say of a row."""
    spread, share = row.case.spread, repeated(row.case)
    return (
        estimated(row.case.latency_ms),
        f"{row.speedup:.2f}",
        bounds(row.interval, 2),
        percent(row.efficiency),
        number(median([rank.collective_ms for rank in spread.ranks]) if spread else None),
        percent(share.of(row.case.roofline.bound) if share else None),
    )


# --------------------------------------------------------------------------------------------------- ranks


def rank_tables(cases: Sequence[Case], kind: str) -> str:
    """Return a table of ranks for every case that has some; "" if none has. `kind` is "table" or "md"."""
    tables = "".join(_ranks(case, case.spread, kind) for case in cases if case.spread)
    measured = any(case.spread and not case.spread.predicted for case in cases)
    return tables + _MEASURED_RANKS * measured


def _ranks(case: Case, spread: Spread, kind: str) -> str:
    over = "" if spread.predicted else f" over {spread.library}"
    about = f"{prediction(spread)}\n" * spread.predicted + f"Imbalance {percent(imbalance(spread))}. "
    if share := repeated(case):
        about += (
            f"Repeated on ranks: {percent(share.flops)} of all FLOPs, {percent(share.bytes)} of all bytes."
        )
    title = f"ranks of {case.scenario}, {case.implementation}: {spread.layout}{over}"
    return f"{title}\n\n{table(kind, RANK_COLUMNS, rank_rows(spread))}\n{about}\n\n"


def rank_rows(spread: Spread) -> list[tuple[str, ...]]:
    """Return what `RANK_COLUMNS` say of every rank; of a prediction, of those that stand for all."""
    ranks = zip(spread.ranks, imbalances(spread), strict=True)
    shown = spread.timed_ranks if spread.predicted else range(len(spread.ranks))
    return [_rank(rank, excess) for rank, excess in ranks if rank.rank in shown]


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


def stage_tables(cases: Sequence[Case], kind: str) -> str:
    """Return the stages of every case that has some; "" if none has. `kind` is "table" or "md"."""
    return "".join(_stages(case, kind) for case in cases if case.stages)


def stages_ms(stages: Sequence[Stage]) -> float:
    """Return the sum of all stages in milliseconds; parts of a stage ("stage: part") are counted in it."""
    return sum(stage.ms for stage in stages if ": " not in stage.name)


def _stages(case: Case, kind: str) -> str:
    sum_ms, title = stages_ms(case.stages), f"stages of {case.scenario}, {case.implementation}"
    rows = [(_part(stage, kind), *stage_cells(stage, sum_ms)) for stage in case.stages]
    forward = number(case.latency_ms.median if case.latency_ms else None)
    note = (
        f"Each is timed alone, with a synchronization before and after: the sum is {number(sum_ms)} ms, a "
        f"forward takes {forward} ms."
    )
    note += " Bookkeeping is not part of a prefill's latency." * (case.mode == "prefill")
    return f"{table(kind, (title, *STAGE_COLUMNS), rows, (title,))}\n{note}\n\n"


def _part(stage: Stage, kind: str) -> str:
    part = stage.name.partition(": ")[2]
    return f"  {part}" if part and kind == "table" else stage.name


def stage_cells(stage: Stage, sum_ms: float) -> tuple[str, ...]:
    """Return what `STAGE_COLUMNS` say of a stage; all of them take `sum_ms`."""
    cost = stage.cost
    return (
        number(stage.ms),
        f"{100 * stage.ms / sum_ms:.1f}" if sum_ms else "-",
        per_second(_rate(cost.flops if cost else 0, stage.ms), ""),
        number(_rate(cost.bytes if cost else 0, stage.ms, 1e9)),
        limit(stage.roofline or Roofline()),
    )


def _rate(amount: int, ms: float, unit: float = 1.0) -> float | None:
    return amount / ms * 1e3 / unit if amount and ms else None
