"""The work of every rank in a scenario."""

from __future__ import annotations

from mla.bench.results.schema import Cost
from mla.bench.subjects.inputs import Requests
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.parallel.layout import Layout, Place
from mla.parallel.work import rank_work


def rank_costs(setting: Setting, layout: Layout, scenario: Scenario, steps: int | None = None) -> list[Cost]:
    """Return what each rank does in a forward, per layer: the mean over a pass, or its first `steps`."""
    count = min(scenario.inputs, steps or scenario.inputs)
    known: dict[Place, Cost] = {}
    places = [layout.place(rank) for rank in range(layout.world)]
    for rank, place in enumerate(places):
        if (alike := _alike(place)) not in known:
            known[alike] = _mean(setting, layout, rank, scenario, count)
    return [known[_alike(place)] for place in places]


def _alike(place: Place) -> Place:
    """Return the first rank that does as much: the parts of `tp` are alike."""
    return Place(place.dp, 0, place.dcp)


def _mean(setting: Setting, layout: Layout, rank: int, scenario: Scenario, steps: int) -> Cost:
    own = Requests.of(scenario, layout.place(rank).dp, layout.dp).scenario(scenario)
    works = [
        rank_work(
            setting.config,
            layout,
            rank,
            own.query_lens,
            own.kv_lens(step),
            setting.dtype.itemsize,
            setting.attention,
        )
        for step in range(steps)
    ]
    flops, moved = (sum(column) for column in zip(*works, strict=True))
    return Cost(flops=round(flops / steps), bytes=round(moved / steps))
