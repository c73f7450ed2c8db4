"""Print ceilings: the file of `ceilings` as a table, those of a run in a few lines. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mla.bench import results
from mla.bench.results.ceilings_file import CeilingRun
from mla.bench.results.schema import Ceiling
from mla.command import table
from mla.errors import ResultError
from mla.text import size

FORMATS = ("table", "md", "json")

_HEADER = ("work", "size", "reached", "% of declared", "fastest way")


def render(run: CeilingRun, kind: str) -> str:
    """Return the ceilings in one of `FORMATS`, ending in a newline. Raises `ResultError` for any other."""
    if kind not in FORMATS:
        raise ResultError(f"ceilings cannot be printed as {kind}: use table, md or json.")
    if kind == "json":
        return results.encode(run).decode()
    rows = [_row(run, ceiling) for ceiling in run.measured]
    if kind == "md":
        body = table.markdown(_HEADER, rows)
    else:
        body = table.aligned(_HEADER, rows, words=("work", "size", "fastest way"))
    return f"{_device(run)}\n\n{body}\n{_declared(run.declared)}"


def run_lines(ceilings: Sequence[Ceiling]) -> list[str]:
    """Return one line per kind of work about the ceilings that a run was compared with."""
    kinds: dict[tuple[str, str | None], list[Ceiling]] = {}
    for ceiling in ceilings:
        kinds.setdefault((ceiling.work, ceiling.dtype), []).append(ceiling)
    return [f"limit of {_work(members[0])}: {_range(members)}" for members in kinds.values()]


def rate(ceiling: Ceiling) -> str:
    """Return a ceiling's value with its unit."""
    unit = "FLOP/s" if ceiling.work == "matmul" else "B/s"
    for prefix, factor in (("T", 1e12), ("G", 1e9)):
        if ceiling.value >= factor or prefix == "G":
            break
    return f"{ceiling.value / factor:.3g} {prefix}{unit}"


def _work(ceiling: Ceiling) -> str:
    if ceiling.work == "matmul":
        return f"{ceiling.dtype} products" if ceiling.dtype else "products"
    return {"read": "reading", "copy": "copying"}[ceiling.work]


def _range(ceilings: Sequence[Ceiling]) -> str:
    """Return the value and source of a single ceiling, or the range of several."""
    if len(ceilings) == 1:
        return f"{rate(ceilings[0])} ({ceilings[0].source}){_varied(ceilings)}{_ours(ceilings)}"
    least, most = (choose(ceilings, key=lambda ceiling: ceiling.value) for choose in (min, max))
    footprints = [ceiling.footprint_bytes or 0 for ceiling in ceilings]
    sizes = f"{size(min(footprints))} to {size(max(footprints))}"
    at = f"{rate(least)} to {rate(most)}, at {len(ceilings)} footprints from {sizes}"
    return at + _varied(ceilings) + _ours(ceilings)


def _varied(ceilings: Sequence[Ceiling]) -> str:
    """Return by how much the lowest measurement of the same lies below the highest."""
    lower = [1 - one.lowest / one.value for one in ceilings if one.lowest is not None]
    if not lower or (len(ceilings) == 1 and ceilings[0].lowest == ceilings[0].value):
        return ""
    if len(ceilings) == 1:
        return f", at the lowest {rate(msgspec.structs.replace(ceilings[0], value=ceilings[0].lowest))}"
    return f", repeated at most {100 * max(lower):.0f} % lower"


def _ours(ceilings: Sequence[Ceiling]) -> str:
    """Return a remark where no way but our own op is known to be as fast."""
    if not any(one.ours for one in ceilings):
        return ""
    where = "" if all(one.ours for one in ceilings) else " at some of them"
    return f"; no other way is faster{where}: the limit is our own kernel's"


def _device(run: CeilingRun) -> str:
    threads = run.environment.get("torch_threads", "?")
    threads += " thread" if threads == "1" else " threads"
    cache = size(run.backend.cache_bytes) if run.backend.cache_bytes else "unknown"
    return f"{run.backend.name} on {run.backend.device}, {threads}, last-level cache {cache}"


def _row(run: CeilingRun, ceiling: Ceiling) -> tuple[str, ...]:
    way, _, shape = ceiling.source.removeprefix("measured: ").rpartition(", ")
    fraction = run.fraction(ceiling)
    of_declared = "-" if fraction is None else f"{100 * fraction:.0f}"
    amount = shape if ceiling.work == "matmul" else size(ceiling.footprint_bytes)
    return (ceiling.work, amount, rate(ceiling), of_declared, f"{way} (our own)" if ceiling.ours else way)


def _declared(declared: Sequence[Ceiling]) -> str:
    if not declared:
        return "The backend declares no peaks for this device.\n"
    return "".join(f"declared {_work(peak)}: {rate(peak)} ({peak.source})\n" for peak in declared)
