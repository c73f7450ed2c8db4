"""The memory a run needs: of every layer, and refused before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_backend import FaultyOp

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
from mla_backends.api import Packed
from mla_backends.testing import HostBackend

Bench = Callable[..., Any]
CPU = ("--backend", "cpu", "--threads", "1", "--implementations", "mla")


def test_the_memory_plan_counts_every_layer() -> None:
    config, backend = mla.MLAConfig.preset("deepseek-v2-lite"), mla.load_backend("cpu", threads=1)
    setting = Setting(config, backend, torch.bfloat16, "auto", 64, 0)
    lengths = {"query_lens": (1,) * 16, "history": (1000,) * 16}
    points = [
        Point(name=f"{layers}", base="d", mode="decode", runs=10, layers=layers, **lengths)
        for layers in (1, 5)
    ]
    single, five = (plan.memory for plan in plan_scenarios(setting, points, ["mla"])[0])
    layer = MlaLayer(setting, random_state_dict(config))
    assert five.per_implementation - single.per_implementation >= 4 * layer.facts().weight_bytes


def test_the_history_exists_twice_on_the_host() -> None:
    """Once for the passes, and once with other signs for the evidence; the oracle widens one request."""
    config, backend = mla.MLAConfig.preset("deepseek-v2-lite"), mla.load_backend("cpu", threads=1)
    setting = Setting(config, backend, torch.bfloat16, "auto", 64, 0)
    points = [
        Point(name=str(place), base="d", mode="decode", runs=2, query_lens=(1,) * 16, history=history)
        for place, history in enumerate([(4000,) + (0,) * 15, (4000,) * 16])
    ]
    single, sixteen = (plan.memory for plan in plan_scenarios(setting, points, ["mla"])[0])
    assert sixteen.host - single.host >= 2 * 15 * 4000 * config.latent_dim * setting.dtype.itemsize


def test_an_indexer_has_weights_and_keys_of_all_tokens() -> None:
    """16 x 4000 keys of 128 numbers are on the device, and twice on the host, once with other signs."""
    preset, backend = mla.MLAConfig.preset("deepseek-v3.2"), mla.load_backend("cpu", threads=1)
    config = replace(preset, hidden_size=256, num_attention_heads=2, q_lora_rank=128)
    point = Point(name="d", base="d", mode="decode", runs=2, query_lens=(1,) * 16, history=(4000,) * 16)
    plans = []
    for heads in (64, 0):
        setting = Setting(replace(config, index_n_heads=heads), backend, torch.bfloat16, "auto", 64, 0)
        plans.append(plan_scenarios(setting, [point], ["mla"])[0][0].memory)
    (indexed, other), keys = plans, 2 * 16 * 4000 * 128
    weights = 2 * (64 * 128 * 128 + 256 * (64 + 128))
    assert indexed.per_implementation - other.per_implementation >= keys + weights


class Copying(FaultyOp):
    """An op that keeps a copy of its weight, as one with a layout of its own does."""

    def pack(self, weight: torch.Tensor) -> Packed:
        return super().pack(weight.clone(memory_format=torch.contiguous_format))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    ("names", "exact"),
    [
        (["mla", "mla[latent_attention=reference]"], True),
        (["mla", "mla[o_proj=reference]", "mla[qkv_a_proj=reference,o_proj=reference]"], True),
        (["mla", "mla[w_uk=reference]", "mla[w_uv=reference]"], False),  # whose views keep all of kv_b
        (["mla", "mla[linear=reference]"], False),
    ],
)
def test_the_plan_subtracts_the_weights_that_implementations_share(
    names: list[str], exact: bool, layers: int
) -> None:
    config = mla.MLAConfig(hidden_size=64, num_attention_heads=2, kv_lora_rank=32)
    offered = {kind: Copying(kind, "none") for kind in ("linear", "batched_linear")}
    setting = Setting(config, HostBackend(ops=offered), torch.float32, "auto", 16, 0)
    point = Point(name="d", base="d", mode="decode", query_lens=(1,), history=(3,), runs=2, layers=layers)
    (plan,), _ = plan_scenarios(setting, [point], names)
    fixture = make_fixture(plan.setting, plan.point)
    fixture.prepare()
    layers_built = [fixture.build(name) for name in names]
    held = {
        packed.data.untyped_storage().data_ptr(): packed.data.untyped_storage().nbytes()
        for impl in layers_built
        for layer in impl.layers  # type: ignore[attr-defined]
        for packed in layer._weights.packed.values()
    }
    saved = sum(impl.facts().weight_bytes for impl in layers_built) - sum(held.values())
    planned = memory.shared_bytes(plan.setting, names, fused=False)
    assert planned == saved if exact else planned < saved
    each, reference = plan.memory.per_implementation, plan.memory.per_reference
    shared = memory.shared_bytes(plan.setting, names, fused=True)
    assert plan.memory.device_bytes(len(names)) == len(names) * each + reference - shared


def test_other_implementations_share_no_weights() -> None:
    config = mla.MLAConfig(hidden_size=64, num_attention_heads=2, kv_lora_rank=32)
    setting = Setting(config, HostBackend(), torch.float32, "auto", 16, 0)
    point = Point(name="d", base="d", mode="decode", query_lens=(1,), history=(3,), runs=2)
    (plan,), _ = plan_scenarios(setting, [point], ["mla", "transformers"])
    assert plan.memory.device_bytes(2) == 2 * plan.memory.per_implementation


def test_the_judging_reference_has_one_layer() -> None:
    config = mla.MLAConfig(hidden_size=64, num_attention_heads=2, kv_lora_rank=32)
    setting = Setting(config, HostBackend(ops={"mine": REFERENCE["linear"]}), torch.float32, "auto", 16, 0)
    lengths = {"query_lens": (1,), "history": (3,)}
    points = [Point(name=f"{n}", base="d", mode="decode", runs=2, layers=n, **lengths) for n in (1, 9)]
    single, nine = (plan.memory for plan in plan_scenarios(setting, points, ["mla"])[0])
    assert nine.per_reference == single.per_reference == single.per_implementation


def test_the_plan_counts_what_every_layer_keeps_for_rebuilt_keys() -> None:
    config = mla.MLAConfig.preset("deepseek-r1")
    setting = Setting(config, HostBackend(), torch.bfloat16, "expanded", 64, 0)
    lengths = {"query_lens": (1,) * 16, "history": (1024,) * 16}
    point = Point(name="d", base="d", mode="decode", runs=1, layers=61, **lengths)
    needs = {}
    for attention in ("expanded", "absorbed"):
        what = replace(setting, attention=attention)
        needs[attention] = plan_scenarios(what, [point], ["mla-reference"])[0][0].memory.per_implementation
    assert needs["expanded"] - needs["absorbed"] == 60 * WORKSPACE_BYTES


class NoSums(type(REFERENCE["expanded_attention"])):  # type: ignore[misc]
    """An op that cannot merge rounds."""

    writes_lse = False


PROMPT = {"query_lens": (4096,), "history": (0,)}
FOLLOW_UP = {"query_lens": (1024,), "history": (4096,)}
ABSORBED = {"query_lens": (1, 1), "history": (4096, 60_000)}
TRICKLE = {"query_lens": (300, 1), "history": (0, 60_000)}  # only the first is expanded


@pytest.mark.parametrize(
    ("lengths", "attention", "grown"),
    [
        (PROMPT, "auto", 4096),
        (FOLLOW_UP, "auto", 5120),
        (PROMPT, "absorbed", 0),
        (ABSORBED, "auto", 0),
        (ABSORBED, "expanded", 60_001),
        (TRICKLE, "auto", 0),
    ],
)
def test_the_plan_counts_a_context_that_is_rebuilt_at_once(
    lengths: dict[str, tuple[int, ...]], attention: str, grown: int
) -> None:
    """An op without a log-sum-exp takes k, kv_b's output, latents and padded v of the longest request."""
    config = mla.MLAConfig.preset("deepseek-r1")
    point = Point(name="p", base="p", mode="prefill", runs=1, **lengths)
    needs = []
    for op in (NoSums(), REFERENCE["expanded_attention"]):
        setting = Setting(config, HostBackend(ops={"mine": op}), torch.bfloat16, attention, 64, 0)
        needs.append(plan_scenarios(setting, [point], ["mla"])[0][0].memory.per_implementation)
    assert needs[0] - needs[1] == grown * (128 * (192 + 128 + 128 + 192) + 576) * 2


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
        r"host; available are [\d.]+ GiB: use fewer requests, shorter histories or a smaller config\."
    )
    assert re.fullmatch(sentence, done.error)


def test_a_topk_that_cannot_fit_names_the_largest_power_of_two_that_does(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mla_backends.host.memory_available", lambda: 8 << 30)
    words = ("--config", "deepseek-v3.2", "--op", "select_latents", "--batch", "1", "--dry-run", "--topk")
    done = bench(*CPU, *words, "1000000000")
    assert (done.code, done.out) == (2, "")
    fits = int(re.fullmatch(r"error: this run needs about .*: --topk (\d+) fits\.", done.error)[1])
    assert bench(*CPU, *words, str(fits)).code == 0
    assert bench(*CPU, *words, str(2 * fits)).code == 2


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
        assert plan.sweep == (sweep(mla.load_backend("cpu")).bytes if cold else 0)
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
    config = mla.MLAConfig(hidden_size=64, num_attention_heads=2, kv_lora_rank=32)
    setting = Setting(config, HostBackend(), torch.float32, "auto", 16, 0)
    point = Point(name="d", base="d", mode="decode", query_lens=(2,), history=(3,), runs=5, layers=layers)
    (plan,), _ = plan_scenarios(setting, [point], ["mla", "mla-reference"])
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
    config = mla.MLAConfig(hidden_size=64, num_attention_heads=2, kv_lora_rank=32)
    setting = Setting(config, HostBackend(), torch.float32, "auto", 16, 0)
    point = Point(name="d", base="d", mode="decode", query_lens=(2,), history=(3,), runs=5)
    (plan,), _ = plan_scenarios(setting, [point], ["mla", "mla-reference"])
    alone, together = (plan.memory.host_bytes(count) + plan.memory.device_bytes(count) for count in (1, 2))
    for free, fits in ((alone - 1, (False, False)), (alone, (True, False)), (together, (True, True))):
        now = plan.memory.with_available(memory.Available(free, free))
        assert (now.fits, now.side_by_side) == fits
