"""What a run will do, and the memory that it needs: of every layer, refused before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mla
from mla.bench.measure.passes import sweep
from mla.bench.plan import memory, request
from mla.bench.plan.request import plan_scenarios
from mla.bench.subjects import base as shelf
from mla.bench.subjects.fixture import make_fixture
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting
from mla.bench.workload.grid import Point
from mla.layer.plan import WORKSPACE_BYTES
from mla.reference import REFERENCE
from mla.weights import random_state_dict
from mla_backends.testing import HostBackend

Bench = Callable[..., Any]
CPU = ("--backend", "cpu", "--threads", "1", "--implementations", "mla")
CONFIG = mla.MLAConfig(hidden_size=64, num_attention_heads=2, kv_lora_rank=32)
FUSED = {"mine": REFERENCE["linear"]}


def setting_of(ops: Any = None, **changes: Any) -> Setting:
    setting = Setting(CONFIG, HostBackend(ops=ops or {}), torch.float32, "auto", 16, 0)
    return replace(setting, **changes)


def point_of(query_lens: Sequence[int], history: Sequence[int], runs: int, layers: int = 1) -> Point:
    lengths: dict[str, Any] = {"query_lens": tuple(query_lens), "history": tuple(history)}
    return Point(name=f"{layers}", base="d", mode="decode", runs=runs, layers=layers, **lengths)


def planned(setting: Setting, *points: Point, names: Sequence[str] = ("mla",)) -> list[memory.MemoryPlan]:
    return [plan.memory for plan in plan_scenarios(setting, points, names)[0]]


def test_baselines_join_what_nobody_chose() -> None:
    setting, point = setting_of(FUSED), point_of((1, 1), (3, 9), 4)
    with_baseline = plan_scenarios(setting, [point], baselines=["transformers"])[1]
    assert with_baseline == ["mla", "mla-reference", "transformers"]
    assert plan_scenarios(setting, [point], ["mla"], baselines=["transformers"])[1] == ["mla"]


@pytest.mark.parametrize(
    ("fused", "names", "chosen", "references"),
    [
        (True, [], ["mla", "mla-reference"], 1),
        (False, [], ["mla"], 0),
        (True, ["mla"], ["mla"], 1),
        (True, ["mla-reference"], ["mla-reference"], 0),
        (False, ["mla"], ["mla"], 0),
    ],
)
def test_fused_ops_bring_the_reference_and_its_memory(
    fused: bool, names: Sequence[str], chosen: list[str], references: int
) -> None:
    setting = setting_of(FUSED if fused else None)
    (plan,), implementations = plan_scenarios(setting, [point_of((1, 1), (3, 9), 4)], names)
    assert implementations == chosen
    each = plan.memory.per_implementation
    assert plan.memory.per_reference == references * each
    assert plan.memory.device_bytes(len(chosen)) == (len(chosen) + references) * each


def test_the_memory_plan_counts_every_layer() -> None:
    config = mla.MLAConfig.preset("deepseek-v2-lite")
    setting = setting_of(config=config, dtype=torch.bfloat16)
    single, five = planned(setting, *(point_of((1,) * 16, (1000,) * 16, 10, layers) for layers in (1, 5)))
    layer = MlaLayer(setting, random_state_dict(config))
    assert five.per_implementation - single.per_implementation >= 4 * layer.facts().weight_bytes


def test_an_indexer_has_weights_and_keys_of_all_tokens() -> None:
    """16 x 4000 keys of 128 numbers are on the device, and twice on the host, once with other signs."""
    preset, point = mla.MLAConfig.preset("deepseek-v3.2"), point_of((1,) * 16, (4000,) * 16, 2)
    config = replace(preset, hidden_size=256, num_attention_heads=2, q_lora_rank=128)
    configs = (replace(config, index_n_heads=heads) for heads in (64, 0))
    settings = (setting_of(config=config, dtype=torch.bfloat16) for config in configs)
    indexed, other = (planned(setting, point)[0] for setting in settings)
    keys, weights = 2 * 16 * 4000 * 128, 2 * (64 * 128 * 128 + 256 * (64 + 128))
    assert indexed.per_implementation - other.per_implementation >= keys + weights


def test_the_judging_reference_has_one_layer() -> None:
    single, nine = planned(setting_of(FUSED), *(point_of((1,), (3,), 2, layers) for layers in (1, 9)))
    assert nine.per_reference == single.per_reference == single.per_implementation


def test_the_plan_counts_what_every_layer_keeps_for_rebuilt_keys() -> None:
    setting = setting_of(config=mla.MLAConfig.preset("deepseek-r1"), dtype=torch.bfloat16)
    point = point_of((1,) * 16, (1024,) * 16, 1, layers=61)
    expanded, absorbed = (
        planned(replace(setting, attention=attention), point, names=["mla-reference"])[0].per_implementation
        for attention in ("expanded", "absorbed")
    )
    assert expanded - absorbed == 60 * WORKSPACE_BYTES


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_run_that_cannot_fit_is_refused_before_it_allocates(
    bench: Bench, small: list[str], dry: list[str]
) -> None:
    Path("huge.toml").write_text(Path("tiny.toml").read_text().replace("[5, 9]", "[5, 2000000000]"))
    huge = ("--config", "tiny.json", "--workload", "huge.toml")
    done = bench(*CPU, *huge, "--scenario", "decode", *dry)
    assert (done.code, done.out) == (2, "")
    sentence = (
        r"error: this run needs about [\d.]+ GiB, which are [\d.]+ GiB on the device and [\d.]+ GiB on the "
        r"host; available are [\d.]+ GiB: use fewer requests, shorter histories, a smaller config or --topk\."
    )
    assert re.fullmatch(sentence, done.error)


@pytest.mark.parametrize(
    ("cache", "cold"), [(["--cache", "warm"], False), (["--cache", "cold"], True), ([], True)]
)
def test_the_plan_counts_the_buffer_that_flushes_the_caches(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch, cache: list[str], cold: bool
) -> None:
    """Once, however many implementations there are."""
    plans: list[memory.MemoryPlan] = []

    def planned(*facts: Any) -> memory.MemoryPlan:
        plans.append(memory.plan_memory(*facts))
        return plans[-1]

    monkeypatch.setattr(request, "plan_memory", planned)
    tiny = small[: small.index("--cache")]
    assert bench("--backend", "cpu", *tiny, *cache, "--dry-run").code == 0
    assert plans
    for plan in plans:
        assert plan.sweep == (sweep(mla.load_backend("cpu"))[0] if cold else 0)
        for count in (1, 2, 3):
            without = replace(plan, sweep=0).device_bytes(count)
            assert plan.device_bytes(count) == without + plan.sweep


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("limit", [shelf.SHELF_BYTES, 0])
def test_the_plan_counts_the_outputs_that_implementations_keep_on_the_host(
    monkeypatch: pytest.MonkeyPatch, limit: int, layers: int
) -> None:
    """Those of the checked pass, of all implementations, and those of the last pass, of the ones loaded."""
    monkeypatch.setattr(shelf, "SHELF_BYTES", limit)
    point = point_of((2,), (3,), 5, layers)
    (plan,), _ = plan_scenarios(setting_of(), [point], ["mla", "mla-reference"])
    fixture = make_fixture(plan.setting, plan.point)
    inputs, _ = fixture.prepare()
    kept = []
    for name in ("mla", "mla-reference"):
        impl = fixture.build(name)
        impl.load(plan.point, inputs)
        for number in (1, 2):
            impl.restore(number)
            assert not impl.outputs(), "those of the pass before are not kept beside those of this one"
            for index in range(5):
                impl.before(index)
                impl.step(index)
                impl.after(index)
            kept.append(
                {
                    x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                    for x in impl.outputs().values()
                }
            )
    bytes_kept = [sum(kept_call.values()) for kept_call in kept]
    spare = plan.memory.outputs - bytes_kept[0]
    assert len(set(bytes_kept)) == 1
    assert spare == (0 if limit else layers * 2 * 64 * 4)  # one buffer is written while the others are kept
    for count in (1, 2):
        assert plan.memory.host_bytes(count) == plan.memory.host + (2 + count) * plan.memory.outputs


def test_a_run_whose_outputs_do_not_fit_on_the_host_is_told_so() -> None:
    (plan,) = planned(setting_of(), point_of((2,), (3,), 5), names=["mla", "mla-reference"])
    alone, together = (plan.host_bytes(count) + plan.device_bytes(count) for count in (1, 2))
    for free, fits in ((alone - 1, (False, False)), (alone, (True, False)), (together, (True, True))):
        now = replace(plan, available=memory.Available(free, free))
        assert (now.fits, now.side_by_side) == fits
