"""What a rank reads and holds: its share, and not the layer."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import checkpoint_maker as maker
import pytest
import torch
from ranks_of_a_run import BOUND, Start
from tiny_run import write_tiny_run

from mla import MLAConfig
from mla.bench import results
from mla.bench.plan import memory
from mla.bench.plan.memory import Available, MemoryPlan
from mla.bench.plan.request import plan_scenarios
from mla.bench.ranks.layers import RankLayer
from mla.bench.ranks.simulation import Simulation
from mla.bench.subjects.inputs import make_inputs
from mla.bench.subjects.setting import Setting
from mla.bench.workload.grid import Point
from mla.checkpoint.folder import SAMPLED_ROWS
from mla.parallel.groups import SimulatedGroups
from mla.parallel.layout import Layout, Link
from mla.reference import REFERENCE
from mla.weights import random_state_dict, weight_shapes
from mla_backends.testing import HostBackend

CONFIG = MLAConfig(
    hidden_size=512, num_attention_heads=16, kv_lora_rank=128, qk_nope_head_dim=64, v_head_dim=64
)
LAYOUTS = ["tp=4", "dcp=4", "dp=2", "tp=2,dcp=2", "dp=2,tp=2,dcp=2"]


def numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def test_a_rank_without_an_oracle_reads_its_rows_alone(start_ranks: Start, tmp_path: Path) -> None:
    made = maker.LAYOUTS["fp8-sharded"].make(tmp_path / "model", "tiny")
    write_tiny_run(tmp_path)
    what = ["--model-path", "model", "--workload", "tiny.toml", "--scenario", "decode"]
    what += [] if made.layer is None else ["--layer", str(made.layer)]
    words = ["--backend", "rank_refusals:Reading", "--implementations", "mla-reference", *what]
    ranks = start_ranks([*words, "--parallel", "tp=2", "-o", "run.json"], tmp_path)
    codes = ranks.wait(BOUND)
    ranks.end()
    assert codes[0] == codes[1], ranks.err()
    read = sum(map(int, (tmp_path / "read.txt").read_text().split()))
    whole = numbers(weight_shapes(made.config))
    half = numbers(weight_shapes(made.config.with_heads(made.config.num_attention_heads // 2)))
    compared = sum(
        min(shape[0], SAMPLED_ROWS) * math.prod(shape[1:]) for shape in weight_shapes(made.config).values()
    )
    assert half <= read - compared <= 1.1 * half < 0.8 * whole  # and scales of blocks
    (case,) = results.read(tmp_path / "run.json").cases
    assert case.check.error_ratio is not None, "the outputs were judged"


@dataclass(frozen=True)
class Processes:
    """Real ranks, as a setting knows them."""

    layout: Layout
    beside: int = 0

    @property
    def world(self) -> int:
        return self.layout.world

    def timed(self, scenario: object) -> list[int]:
        return []


def setting_of(ranks: Any, **more: Any) -> Setting:
    return Setting(CONFIG, HostBackend(), torch.float32, "absorbed", 16, 0, ranks=ranks, **more)


def point(history: int, requests: int = 4) -> Point:
    lengths = {"query_lens": (1,) * requests, "history": tuple(history + 7 * n for n in range(requests))}
    return Point(name="d", base="d", mode="decode", runs=2, passes=1, **lengths)  # type: ignore[arg-type]


PREFILL = Point(
    name="p", base="p", mode="prefill", query_lens=(96,) * 4, history=(30, 37, 44, 51), runs=2, passes=1
)


def planned(ranks: Any, what: Point, **more: Any) -> MemoryPlan:
    (plan,), _ = plan_scenarios(setting_of(ranks, **more), [what], ["mla"])
    return plan.memory


def held(make: Callable[[], Any]) -> int:
    """Return the bytes of tensors that are alive only because of what `make` returns."""
    before = _alive()
    made = make()
    added = sum(size for place, size in _alive().items() if place not in before)
    del made
    return added


def _alive() -> dict[int, int]:
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def longest(what: Point) -> int:
    """Return what the keys of a request take while it is attended."""
    return 16 * max(what.final_lens) * CONFIG.latent_dim


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan for nothing but what can be counted: small tables of numbers are not."""
    monkeypatch.setattr(memory, "WORKSPACE", 0)


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("history", [30, 6000])  # weights, then latents, are most of it
def test_the_plan_is_what_the_fullest_rank_holds(layout: str, history: int) -> None:
    what, parsed = point(history), Layout.parse(layout)
    state, inputs = random_state_dict(CONFIG, 0, torch.float32), make_inputs(CONFIG, what, 0, torch.float32)
    plan = planned(Processes(parsed), what)

    def load(rank: int) -> RankLayer:
        part = RankLayer(setting_of(Processes(parsed)), state, "mla", None, SimulatedGroups(parsed, rank))
        part.load(what, inputs)
        return part

    first, last = 0, parsed.world - 1  # most tokens of a request; the longest requests
    most = max(held(partial(load, rank)) for rank in (first, last))
    assert 0.98 * most <= plan.per_implementation <= 1.2 * most + longest(what)


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", [point(30), point(6000), PREFILL], ids=["weights", "latents", "queries"])
def test_the_plan_of_a_simulation_is_what_all_ranks_hold(layout: str, what: Point) -> None:
    simulation = Simulation(Layout.parse(layout), Link.parse("ideal"), "given")
    state, inputs = random_state_dict(CONFIG, 0, torch.float32), make_inputs(CONFIG, what, 0, torch.float32)
    plan = planned(simulation, what)

    def run() -> Any:
        layer = simulation.layer(setting_of(simulation), state, "mla", None)
        layer.load(what, inputs)
        layer.restore(1)
        layer.before(0)
        layer.step(0)
        return layer

    everything = held(run)
    assert 0.98 * everything <= plan.per_implementation <= 1.3 * everything + longest(what)


@pytest.mark.usefixtures("tight")
def test_what_one_device_has_no_room_for_fits_on_two() -> None:
    long = point(6000, requests=16)
    alone = planned(None, long)
    room = Available(device=int(0.8 * alone.device_bytes(1)), host=None)
    for layout, fits in (("dp=2", True), ("dcp=2", True), ("tp=2", False)):  # which has all latents twice
        plan = planned(Processes(Layout.parse(layout)), long)
        assert replace(plan, shared=False, available=room).fits == fits, layout
    short = planned(None, point(30, requests=1))
    for layout, fits in (("tp=2", True), ("tp=8", True), ("tp=1", False)):
        plan = planned(Processes(Layout.parse(layout)), point(30, requests=1))
        exact = Available(device=short.device_bytes(1) - 1, host=None)
        assert replace(plan, shared=False, available=exact).fits == fits, layout


def test_ranks_on_one_host_count_there_together() -> None:
    apart, together = (planned(Processes(Layout(tp=2), beside), point(30)) for beside in (0, 1))
    weights = 4 * numbers(weight_shapes(CONFIG))
    more = together.host_bytes(1) - apart.host_bytes(1)
    assert more >= apart.per_implementation + weights  # its device is this host, and it draws all weights
    on_cards = [replace(plan, shared=False).host_bytes(1) for plan in (apart, together)]
    assert weights <= on_cards[1] - on_cards[0] < more


def test_only_rank_0_has_the_reference_and_it_is_of_the_whole_layer() -> None:
    fused = HostBackend(ops={"own": REFERENCE["linear"]})
    (plan,), _ = plan_scenarios(
        replace(setting_of(Processes(Layout(tp=8))), backend=fused), [point(30)], ["mla", "mla-reference"]
    )
    memory = plan.memory
    assert memory.per_reference == planned(None, point(30)).per_implementation > memory.per_implementation
    assert (
        memory.device_bytes(2) == 2 * memory.per_implementation + memory.per_reference
    )  # sharing no weights
