"""Print ceilings: the file of `ceilings` as a table, those of a run in a few lines. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mla.bench import results
from mla.bench.results.schema import Ceiling, CeilingRun
from mla.bench.terminal.digits import per_second
from mla.bench.terminal.tables import Table
from mla.errors import ResultError
from mla.text import DTYPES, grouped, size

FORMATS = ("table", "md", "json")

_HEADER = ("work", "size", "reached", "% of declared", "fastest way")


def render(run: CeilingRun, kind: str) -> str:
    """Return the ceilings in one of `FORMATS`, ending in a newline. Raises `ResultError` for any other."""
    if kind not in FORMATS:
        raise ResultError(f"ceilings cannot be printed as {kind}: use table, md or json.")
    if kind == "json":
        return results.encode(run).decode()
    rows = [_row(run, ceiling) for ceiling in run.measured]
    declared = [f"declared {_work(peak)}: {rate(peak)} ({peak.source})" for peak in run.declared]
    notes = declared or ["The backend declares no peaks for this device."]
    return Table(_device(run), _HEADER, rows, notes, ("work", "size", "fastest way")).text(kind)


def run_lines(ceilings: Sequence[Ceiling]) -> list[str]:
    """Return one line per kind of work about the ceilings that a run was compared with."""
    return [f"{_work(members[0])}: {_range(members)}" for members in _by_kind(ceilings).values()]


def peaks(ceilings: Sequence[Ceiling]) -> str:
    """Return the limits in a few words, such as "Peaks 440 GFLOP/s bf16, 69 to 113 GB/s."."""
    names = []
    for members in _by_kind(ceiling for ceiling in ceilings if ceiling.work != "copy").values():
        names.append(" ".join(filter(None, (_span(members), short(members[0].dtype)))))
    return f"Peak{'s' * (len(names) > 1)} {', '.join(names)}." if names else ""


def of_our_own(ceilings: Sequence[Ceiling]) -> str:
    """Return whose peak only our own op reached, such as "memory and bf16"; "" if something else did."""
    return " and ".join(
        dict.fromkeys(short(ceiling.dtype) or "memory" for ceiling in ceilings if ceiling.ours)
    )


def short(dtype: str | None) -> str:
    """Return a dtype's short name, such as "bf16"; "" for None."""
    return next((short for short, long in DTYPES.items() if long == dtype), dtype or "")


def _by_kind(ceilings: Iterable[Ceiling]) -> dict[tuple[str, str | None], list[Ceiling]]:
    return grouped(ceilings, lambda ceiling: (ceiling.work, ceiling.dtype))


def rate(ceiling: Ceiling) -> str:
    """Return a ceiling's value with its unit."""
    return per_second(ceiling.value, "FLOP/s" if ceiling.work == "matmul" else "B/s")


def _work(ceiling: Ceiling) -> str:
    if ceiling.work == "matmul":
        return f"{ceiling.dtype or ''} matmul rate".lstrip()
    return f"{ceiling.work} bandwidth"


def _span(ceilings: Sequence[Ceiling]) -> str:
    """Return the least and the greatest value with one unit, such as "69 to 113 GB/s"."""
    low, high = (rate(choose(ceilings, key=lambda ceiling: ceiling.value)) for choose in (min, max))
    low = low.removesuffix(f" {high.partition(' ')[2]}")
    return high if high.startswith(f"{low} ") else f"{low} to {high}"


def _range(ceilings: Sequence[Ceiling]) -> str:
    """Return the value and source of a single ceiling, or the range of several; and how far to trust it."""
    footprints = [ceiling.footprint_bytes or 0 for ceiling in ceilings]
    where = f" at {size(min(footprints))} to {size(max(footprints))}"
    where = f" ({ceilings[0].source})" if len(ceilings) == 1 else where
    lower = max((1 - ceiling.lowest / ceiling.value for ceiling in ceilings if ceiling.lowest), default=0.0)
    varied = f", up to {100 * lower:.0f} % lower when repeated" * (lower > 0)
    some = " at some sizes" * (not all(ceiling.ours for ceiling in ceilings))
    caveat = f"; caveat: only the kernel under test is as fast{some}"
    return _span(ceilings) + where + varied + caveat * any(ceiling.ours for ceiling in ceilings)


def _device(run: CeilingRun) -> str:
    count, cache = run.environment.get("torch_threads", "?"), size(run.backend.cache_bytes, unknown="unknown")
    threads = f"{count} thread{'s' * (count != '1')}"
    return f"{run.backend.name} on {run.backend.device}, {threads}, last-level cache {cache}"


def _row(run: CeilingRun, ceiling: Ceiling) -> tuple[str, ...]:
    way, _, shape = ceiling.source.removeprefix("measured: ").rpartition(", ")
    fraction = run.fraction(ceiling)
    of_declared = "-" if fraction is None else f"{100 * fraction:.0f}"
    amount = shape if ceiling.work == "matmul" else size(ceiling.footprint_bytes)
    return (ceiling.work, amount, rate(ceiling), of_declared, f"{way} (our own)" if ceiling.ours else way)
