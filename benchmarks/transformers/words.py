"""What a comparison found, in sentences: documents hold them as they are printed here."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.transformers.points import NAMES, OURS, PAGED, STOCK, Group, Point
from benchmarks.transformers.record import Row
from benchmarks.transformers.tables import TITLES, times
from mla.bench.results.stats import median

OFTEN = 0.9  # of the rows


def sentences(group: Group) -> list[str]:
    """Return findings about speed, memory and the measurement itself."""
    decode = group.of("decode")
    found = [
        *(_range(group, decode, party) for party in (OURS, PAGED)),
        _not_faster(group),
        *_refused(group),
        *(_even(group, party) for party in (OURS, PAGED)),
        _agreement(group),
        _spread(group),
    ]
    return [sentence for sentence in found if sentence]


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
    return [median(one) for one in row.attention_ms]
