"""Print ceilings: the file of `ceilings` as a table, and those of a run in a few lines. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench import results
from mla.bench.results.ceilings_file import CeilingRun
from mla.bench.results.schema import Ceiling
from mla.command import table
from mla.errors import ResultError
from mla.text import size

FORMATS = ("table", "md", "json")

_HEADER = ("work", "size", "reached", "% of declared", "fastest way")


def render(run: CeilingRun, kind: str) -> str:
    """Return the ceilings in one of `FORMATS`, newline at the end. Raises `ResultError` for any other."""
    if kind not in FORMATS:
        raise ResultError(f"ceilings are printed as {', '.join(FORMATS)}, not as {kind}.")
    if kind == "json":
        return results.encode(run).decode()
    rows = [_row(run, one) for one in run.measured]
    if kind == "md":
        body = table.markdown(_HEADER, rows)
    else:
        body = table.aligned(_HEADER, rows, words=("work", "size", "fastest way"))
    return f"{_device(run)}\n\n{body}\n{_declared(run.declared)}"


def run_lines(ceilings: Sequence[Ceiling]) -> list[str]:
    """Return one line per kind of work about the ceilings that a run was held against."""
    kinds: dict[tuple[str, str | None], list[Ceiling]] = {}
    for one in ceilings:
        kinds.setdefault((one.work, one.dtype), []).append(one)
    return [f"limit of {_work(found[0])}: {_range(found)}" for found in kinds.values()]


def rate(found: Ceiling) -> str:
    """Return a ceiling's value with its unit."""
    unit = "FLOP/s" if found.work == "matmul" else "B/s"
    for prefix, factor in (("T", 1e12), ("G", 1e9)):
        if found.value >= factor or prefix == "G":
            break
    return f"{found.value / factor:.3g} {prefix}{unit}"


def _work(found: Ceiling) -> str:
    if found.work == "matmul":
        return f"{found.dtype} products" if found.dtype else "products"
    return {"read": "reading", "copy": "copying"}[found.work]


def _range(found: Sequence[Ceiling]) -> str:
    """Return the value and source of one ceiling, or between which values several lie."""
    if len(found) == 1:
        return f"{rate(found[0])} ({found[0].source})"
    least, most = (choose(found, key=lambda one: one.value) for choose in (min, max))
    small, large = (choose(one.footprint_bytes or 0 for one in found) for choose in (min, max))
    return f"{rate(least)} to {rate(most)}, at {len(found)} footprints from {size(small)} to {size(large)}"


def _device(run: CeilingRun) -> str:
    threads = run.environment.get("torch_threads", "?")
    cache = size(run.backend.cache_bytes) if run.backend.cache_bytes else "unknown"
    return f"{run.backend.name} on {run.backend.device}, {threads} threads, last-level cache {cache}"


def _row(run: CeilingRun, found: Ceiling) -> tuple[str, ...]:
    way, _, shape = found.source.removeprefix("measured: ").rpartition(", ")
    fraction = run.fraction(found)
    of_declared = "-" if fraction is None else f"{100 * fraction:.0f}"
    amount = shape if found.work == "matmul" else size(found.footprint_bytes)
    return (found.work, amount, rate(found), of_declared, way)


def _declared(declared: Sequence[Ceiling]) -> str:
    if not declared:
        return "The backend declares no peaks of this device.\n"
    return "".join(f"declared {_work(one)}: {rate(one)} ({one.source})\n" for one in declared)
