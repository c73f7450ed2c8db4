"""Tables of a comparison, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.transformers.points import (
    NAMES,
    OURS,
    PAGED,
    STOCK,
    Group,
    Measured,
    Point,
    middle,
)
from benchmarks.transformers.record import Row
from mla.bench.terminal.digits import number
from mla.command.display import markdown

TITLES = {
    "decode": "a decode step, by context length",
    "append": "64 tokens appended, by context length",
    "prefill": "prefill of a whole prompt",
}
TIMES = (
    "tokens",
    *("attention: `transformers` ms", "with"),
    *("`use_mla` ms", "as fast", "`PagedCache` ms", "as fast"),
    *("tiny model: `transformers` ms", "`use_mla` ms", "as fast", "`PagedCache` ms", "as fast"),
)

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header and rows


def tables(group: Group) -> list[str]:
    """Return, under headings: times of each phase, of both settings of the allocator, and memory."""
    made: dict[str, Table] = {}
    for phase, title in TITLES.items():
        made[title] = TIMES, [_times(one) for one in group.of(phase)]
    if len(group.allocators) > 1:
        made["attention with either allocator"] = _by_allocator(group)
    made["what a layer keeps"] = _kept(group)
    made["memory of a forward"] = _memory(group)
    return [_headed(group, title, *table) for title, table in made.items() if table[1]]


def _headed(group: Group, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"### {group.title}: {title}\n\n{markdown(header, rows)}"


def _times(point: Point) -> tuple[str, ...]:
    """Return the cells of a length."""
    stock = point.best(STOCK)
    kind = f"{stock.side}, {stock.dtype}, {stock.allocator}" if stock else point.why_not
    cells = [str(point.length), _ms(stock, "attention_ms"), kind]
    for party in (OURS, PAGED):
        row = point.best(party)
        setting = f" ({row.allocator})" if row else ""
        cells += [_ms(row, "attention_ms") + setting, times(point.ratio(party))]
    cells.append(_ms(stock, "model_ms"))
    for party in (OURS, PAGED):
        cells += [_ms(point.best(party), "model_ms"), times(point.ratio(party, "model_ms"))]
    return tuple(cells)


def _by_allocator(group: Group) -> Table:
    """Return each party's ms of attention in every setting, and what is faster within it."""
    header = ["phase", "tokens"]
    for setting in group.allocators:
        header += [f"{setting}: {NAMES[STOCK]} ms"]
        header += [word for party in (OURS, PAGED) for word in (f"{NAMES[party]} ms", "as fast")]
    rows: list[Sequence[str]] = []
    for point in group.points:
        cells = [point.phase, str(point.length)]
        for setting in group.allocators:
            cells.append(_ms(point.best(STOCK, setting), "attention_ms"))
            for party in (OURS, PAGED):
                ratio = times(point.ratio(party, allocator=setting))
                cells += [_ms(point.best(party, setting), "attention_ms"), ratio]
        rows.append(cells)
    return header, rows


def _kept(group: Group) -> Table:
    """Return what is there between forwards for a layer, after the longest history."""
    longest = max(group.points, key=lambda point: (point.lightest(STOCK) is not None, point.length))
    rows = [
        (
            NAMES[party],
            _mib(row.weight_bytes),
            f"{row.cache_bytes / (row.tokens * row.requests):.0f}",
        )
        for party in NAMES
        if (row := longest.lightest(party))
    ]
    return ("", "weights of an attention layer, MiB", "cache, bytes per token"), rows


def _memory(group: Group) -> Table:
    """Return what a forward takes besides, and the sums for one layer and for all."""
    header = ["phase", "tokens", *(f"besides: {NAMES[STOCK]} MiB", f"{NAMES[OURS]}", f"{NAMES[PAGED]}")]
    for layers in (1, group.layers):
        several = f"{layers} layers" if layers > 1 else "a layer"
        header += [f"{several}: {NAMES[STOCK]} MiB", f"{NAMES[OURS]}", f"{NAMES[PAGED]}"]
    rows: list[Sequence[str]] = []
    for point in group.points:
        cells = [point.phase, str(point.length)]
        cells += [_of(point.lightest(party), lambda row: _mib(row.transient_bytes)) for party in NAMES]
        for layers in (1, group.layers):
            cells += [_share(point, party, layers) for party in NAMES]
        rows.append(cells)
    return header, rows


def _share(point: Point, party: str, layers: int) -> str:
    """Return MiB, and how much that is of what `transformers` needs."""
    needed, stock = point.needed(party, layers), point.needed(STOCK, layers)
    if needed is None:
        return "-"
    return _mib(needed) + (f" ({needed / stock:.2f})" if stock and party != STOCK else "")


def times(ratio: float | None) -> str:
    """Return a ratio of speeds."""
    return "-" if ratio is None else f"{number(ratio)}x"


def _ms(row: Row | None, measured: Measured) -> str:
    return _of(row, lambda row: number(middle(row, measured)))


def _of(row: Row | None, cell: Callable[[Row], str]) -> str:
    return "-" if row is None else cell(row)


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f}"
