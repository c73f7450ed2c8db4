"""Tables of a comparison, as Markdown, and what it found in sentences: documents hold both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.transformers.records import NAMES, OURS, PAGED, STOCK, Group, Measured, Point, Row, middle
from mla.bench.results.stats import median
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
        made[title] = TIMES, [_times(point) for point in group.of(phase)]
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


# -------------------------------------------------------------------------------------------- sentences

OFTEN = 0.9  # of the rows


def sentences(group: Group) -> list[str]:
    """Return findings about speed, memory and the measurement itself."""
    decode = group.of("decode")
    remarks = [
        *(_range(group, decode, party) for party in (OURS, PAGED)),
        _not_faster(group),
        *_refused(group),
        *(_even(group, party) for party in (OURS, PAGED)),
        _agreement(group),
        _spread(group),
    ]
    return [sentence for sentence in remarks if sentence]


def _range(group: Group, points: Iterable[Point], party: str) -> str:
    """Say how much faster attention is in the shortest and in the longest decode step."""
    known = [(point.length, ratio) for point in points if (ratio := point.ratio(party)) is not None]
    if not known:
        return ""
    (shortest, least), (longest, most) = known[0], known[-1]
    return (
        f"{group.title}, {NAMES[party]}: attention in a decode step is {times(least)} as fast as in"
        f" `transformers` after {shortest} tokens, and {times(most)} after {longest}."
    )


def _not_faster(group: Group) -> str:
    """List where attention is slower than that of `transformers`."""
    slower = [
        f"{times(ratio)} ({NAMES[party]}, {point.phase}, {point.length} tokens)"
        for point in group.points
        for party in (OURS, PAGED)
        if (ratio := point.ratio(party)) is not None and ratio < 1
    ]
    if not slower:
        return f"{group.title}: attention is as fast as in `transformers`, or faster, at all lengths."
    return f"{group.title}: attention is slower than in `transformers` here: {', '.join(slower)}."


def _refused(group: Group) -> list[str]:
    """Say what `transformers` could not run."""
    return [
        f"{group.title}: `transformers` did not run {TITLES[point.phase]} ({point.length} tokens):"
        f" {point.why_not}."
        for point in group.points
        if point.why_not
    ]


def _even(group: Group, party: str) -> str:
    """Say from which measured length on a whole model's attention needs less memory."""
    said = []
    for phase in TITLES:
        known = [
            (point.length, needed < stock)
            for point in group.of(phase)
            if (needed := point.needed(party, group.layers)) and (stock := point.needed(STOCK, group.layers))
        ]
        more = [length for length, less in known if not less]
        less = [length for length, _ in known if length > max(more, default=0)]
        if known:
            said.append(f"{phase} from {less[0]} tokens on" if less else f"{phase} at no measured length")
    if not said:
        return ""
    return (
        f"{group.title}, {NAMES[party]}: attention of all {group.layers} layers needs less memory than in"
        f" `transformers` in {', '.join(said)}."
    )


def _agreement(group: Group) -> str:
    """Say how many rows were compared, and how far apart they are."""
    rows = _timed(group)
    distances = [row.deviation for row in rows if row.deviation is not None]
    if not distances:
        return f"{group.title}: no attention was compared."
    return (
        f"{group.title}: in {len(distances)} of {len(rows)} rows with times, attention was compared with that"
        f" of the first side of `transformers`, and was within {100 * max(distances):.2g} % of it."
    )


def _spread(group: Group) -> str:
    """Say how far medians of rounds lie apart."""
    spreads = sorted(max(middles) / min(middles) - 1 for row in _timed(group) if (middles := _middles(row)))
    often = spreads[min(len(spreads) - 1, int(OFTEN * len(spreads)))]
    return (
        f"{group.title}: medians of rounds of attention lie within {100 * often:.0f} % of each other in"
        f" {100 * OFTEN:.0f} % of the rows, and within {100 * spreads[-1]:.0f} % in all."
    )


def _timed(group: Group) -> list[Row]:
    return [row for point in group.points for row in point.rows if row.model_ms]


def _middles(row: Row) -> list[float]:
    return [median(samples) for samples in row.attention_ms]
