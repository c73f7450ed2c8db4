"""Labels of rooflines never overlap, whatever the data; colours and scales keep every bar legible."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
from matplotlib.transforms import Bbox

from mla.bench import results
from mla.bench.report import roofline_data, series
from mla.bench.report.draw import chart_axes, roofline_chart, theme
from mla.bench.report.draw.labels import Box, along, around, beside, place
from mla.bench.report.draw.style import COLOURS, KNOWN, Colours, Look, Palette
from mla.bench.report.draw.svg import styled

Case = Callable[..., results.Case]


def hostile(rng: random.Random, make_run: Any, case: Case) -> series.ResultFile:
    """Return a file whose points and roofs lie as close together as chance will have it."""
    run = make_run()
    middle, spread = 10 ** rng.uniform(-3, 3), rng.choice([0.0, 0.01, 0.3, 3.0])
    run.cases = []
    for number in range(rng.randint(1, roofline_chart.MOST_LABELS)):
        flops = max(1, int(1e9 * 10 ** rng.uniform(-spread, spread)))
        limit = results.Roofline(fraction=rng.uniform(0.001, 1), bound="memory")
        if rng.random() < 0.2:
            limit = results.Roofline(bound="memory", doubt="faster than its floor")
        one = case(
            implementation=f"impl {number}",
            base=rng.choice(["prefill", "decode"]),
            cost=results.Cost(flops=flops, bytes=max(1, int(flops / middle))),
            roofline=limit,
        )
        assert one.latency_ms is not None
        one.latency_ms.median = 10 ** rng.uniform(-spread, spread)
        run.cases.append(one)
    names = ["", "bfloat16", "漢" * 30, "a long name, " * 9, "$x$"]
    for work, unit in itertools.product(("read", "matmul"), (0.5, 0.8, 1.0, 1.12, 1.3)):
        value = unit * (1e9 if work == "matmul" else 1e9 / middle) * 10 ** rng.uniform(-spread, spread)
        more = {"dtype": rng.choice(names), "footprint_bytes": rng.choice([None, 28 << 20, 512 << 20])}
        run.ceilings.append(results.Ceiling(work=work, value=value, source="here", **more))
    return series.result_files(["x"], [run])[0]


def texts(figure: Any) -> list[tuple[str, Bbox]]:
    """Return every text of a chart, its ticks and axes included, and the box it takes."""
    (axes,) = figure.axes
    ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    low, high = axes.bbox.min - 1, axes.bbox.max + 1
    named = [axes.xaxis.label, axes.yaxis.label, *axes.texts]
    for tick in ticks:
        x, y = axes.transData.transform(tick.get_position())
        if (tick in axes.get_xticklabels() and low[0] <= x <= high[0]) or (
            tick not in axes.get_xticklabels() and low[1] <= y <= high[1]
        ):
            named.append(tick)
    return [(text.get_text(), text.get_window_extent()) for text in named if text.get_text()]


@pytest.mark.parametrize("seed", range(24))
def test_no_label_of_a_roofline_meets_another(make_run: Any, case: Case, seed: int) -> None:
    file = hostile(random.Random(seed), make_run, case)
    data = roofline_data.roofline(file)
    names = [one.implementation for one in file.run.cases]
    look = Look(Colours(names), Palette(one.base for one in file.run.cases))
    with styled():
        figure, left_out = roofline_chart.draw(data, look)
        found = texts(figure)
    for (name, box), (other, another) in itertools.combinations(found, 2):
        assert not box.overlaps(another), (name, other)
    (axes,) = figure.axes
    assert len(axes.texts) + left_out == len(data.dots) + len(data.drawn)
    assert left_out <= 11  # of up to 20: none is nearer to another mark than to its own
    for text in axes.texts:
        box = text.get_window_extent()
        assert axes.bbox.x0 <= box.x0 <= box.x1 <= axes.bbox.x1 + 1


def test_labels_of_a_quiet_chart_are_all_written_and_next_to_their_points(make_run: Any, case: Case) -> None:
    run = make_run()
    limit = results.Roofline(fraction=0.5, bound="memory")
    run.cases = [
        case(cost=results.Cost(flops=10**place, bytes=10**6), roofline=limit) for place in (6, 7, 8, 9)
    ]
    run.ceilings = [results.Ceiling(work="matmul", value=1e13, source="here", dtype="bfloat16")]
    data = roofline_data.roofline(series.result_files(["x"], [run])[0])
    with styled():
        figure, left_out = roofline_chart.draw(data, Look(Colours(["mla"]), Palette(["prefill"])))
    assert left_out == 0
    written = sorted(text.get_text() for text in figure.axes[0].texts)
    assert written == ["50 %"] * 4 + ["limit 10 TFLOP/s (bfloat16)"]


def test_places_stay_inside_and_off_what_is_taken() -> None:
    inside, size = Box(0, 0, 100, 50), (20.0, 8.0)
    taken = [around((50, 25), 6)]
    while (box := place(beside((50, 25), size), inside, taken)) is not None:
        assert inside.holds(box)
        assert not any(box.meets(other) for other in taken)
        taken.append(box)
    assert len(taken) > 10
    first = next(iter(along((0, 0), (90, 40), size, above=True)))
    assert (first.right, first.bottom) == (90, 42)


@pytest.mark.parametrize(
    ("ends", "end"),
    [
        ([9.4, 10.0, 12.0, 1980.0], 12.0),  # a yardstick
        ([1.7, 3.9, 95.0, 96.0], 3.9),
        (
            [100.0, 3000.0, 4000.0, 5000.0],
            5000.0,
        ),  # most bars are long
        ([1.0, 7.0, 49.0], 49.0),
        ([1.0, 100.0], 100.0),
        ([5.0], 5.0),
        ([0.0], 1.0),
    ],
)
def test_a_few_bars_never_flatten_the_others(ends: Sequence[float], end: float) -> None:
    assert chart_axes.scale_end(ends) == end


def test_a_colour_belongs_to_a_name_whatever_else_is_drawn() -> None:
    both = Colours(["x", "mla-reference", "mla"]), Colours(["mla", "transformers", "mla-reference"])
    for name in ("mla", "mla-reference"):
        assert both[0][name] == both[1][name] == COLOURS[KNOWN.index(name)]
    many = [f"peer {place}" for place in range(5)]
    shuffled = random.Random(0).sample(many, 5)
    assert {name: Colours(many)[name] for name in many} == {name: Colours(shuffled)[name] for name in many}
    assert len({Colours([*KNOWN, *many])[name] for name in (*KNOWN, *many)}) == len(COLOURS)
    assert Colours(["peer 1"])["peer 1"] not in COLOURS[: len(KNOWN)]
    assert Colours([f"{place}" for place in range(30)])["29"] in COLOURS


# What dichromats see of linear red, green and blue (Machado, Oliveira and Fernandes, 2009, severity 1).
SIGHTS = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deutan": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritan": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def lab(colour: str, sight: str) -> tuple[float, float, float]:
    """Return a colour in CIELAB as it is seen."""
    values = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in values]
    seen = [min(1, max(0, dot(row, linear))) for row in SIGHTS[sight]]
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    x, y, z = (curve(dot(row, seen) / white) for row, white in zip(rows, (0.9505, 1, 1.089), strict=True))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def dot(row: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(row, other, strict=True))


def curve(t: float) -> float:
    return t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116


@pytest.mark.parametrize("mode", get_args(theme.Mode))
@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_can_be_told_apart_by_the_colour_blind(sight: str, mode: str) -> None:
    seen = {name: lab(getattr(tone, mode), sight) for name, tone in theme.SERIES.items()}
    for one, other in itertools.combinations(seen, 2):
        assert math.dist(seen[one], seen[other]) > 12, (one, other)
