"""Output gates, sinks, and heads without rotary channels: right on both paths, and wrong ones are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_cases import LAYER_BOUND

import mla
from mla import MLAConfig
from mla.errors import UnsupportedOps
from mla.layer.forward import Step, gate_heads
from mla.layer.packed_weights import PackedWeights
from mla.layer.plan import rebuilt_bytes
from mla.reference import REFERENCE
from mla.reference.small import rms_norm
from mla_backends.testing import HostBackend

# Of Kimi K3, of Ling 3, and without rotary channels; as many gates as channels of the hidden state.
CONFIGS = {
    "kimi": MLAConfig(60, 5, 24, 32, 16, 8, 12, rope_theta=None, output_gate="element"),
    "ling": MLAConfig(60, 5, None, 32, 16, 8, 12, output_gate="head"),
    "no rope": MLAConfig(60, 5, 24, 32, 16, 0, 12),
    "no rope, gated": MLAConfig(60, 5, None, 32, 16, 0, 12, output_gate="element"),
    "sinks": MLAConfig(60, 5, 24, 32, 16, 8, 12, sink_logits=True),
    "sinks, gated": MLAConfig(60, 5, None, 32, 16, 8, 12, sink_logits=True, output_gate="element"),
}
GATED = [name for name, config in CONFIGS.items() if config.gate_width]
# Prefill, decode, and several tokens after a history.
STEP = ([20, 1, 6], [0, 90, 33])
PATHS = ("absorbed", "expanded")
# Every deviation below costs at least this.
VISIBLE = 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", PATHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_agrees_with_the_oracle(
    make_case: Any, assert_rows_close: Any, name: str, attention: str, dtype: torch.dtype
) -> None:
    case = make_case(*STEP, CONFIGS[name], attention=attention, dtype=dtype)
    assert_rows_close(case.run(), case.truth(), LAYER_BOUND[dtype])
    assert all(torch.equal(weight, case.state[key]) for key, weight in case.layer.state_dict().items())


@pytest.mark.parametrize("name", GATED)
def test_the_oracle_gates_as_the_formula_says(make_case: Any, name: str) -> None:
    """With gates of 0, half of what there is without; with large ones, all or nothing of a head."""
    config = CONFIGS[name]
    case = make_case(*STEP, config)
    case.state["g_proj.weight"].zero_()
    half = case.truth()
    plain = {key: weight for key, weight in case.state.items() if key != "g_proj.weight"}
    case.config, case.state = replace(config, output_gate=None), plain
    assert torch.allclose(2 * half, case.truth(), rtol=1e-12)


def no_sigmoid(heads: torch.Tensor, gate: torch.Tensor) -> None:
    heads.mul_(gate.unflatten(1, (heads.shape[1], -1)))


GATES: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "left out": lambda heads, gate: None,
    "sigmoid left out": lambda heads, gate: no_sigmoid(heads, gate),
    "of another head": lambda heads, gate: gate_heads(
        heads, gate.unflatten(1, (5, -1)).roll(1, 1).flatten(1)
    ),
    "of another token": lambda heads, gate: gate_heads(heads, gate.roll(1, 0)),
    "negated": lambda heads, gate: gate_heads(heads, -gate),
    "twice": lambda heads, gate: (gate_heads(heads, gate.clone()), gate_heads(heads, gate))[0],
}


class NormedInput(Step):
    """The gate reads the hidden state through a norm."""

    def linear(self, ops: Any, role: str, x: torch.Tensor, out: torch.Tensor, bias: str = "") -> None:
        if role == "g_proj":
            x = rms_norm(3 * x[:, :30], torch.ones(30), 1e-6).repeat(1, 2).to(x.dtype)
        super().linear(ops, role, x, out, bias)


class AfterOutput(Step):
    """The gate multiplies what o_proj returns."""

    def run(
        self, ops: Any, hidden: torch.Tensor, batch: Any, plan: Any, pages: Any, out: Any, *sparse: Any
    ) -> None:
        gates: list[torch.Tensor] = []
        plain = replace(self, gate=lambda heads, gate: gates.append(gate.clone()))
        Step.run(plain, ops, hidden, batch, plan, pages, out)
        out.mul_(gates[0].sigmoid().repeat_interleave(out.shape[1] // gates[0].shape[1], 1))


def wrong_steps(step: Step) -> dict[str, Step]:
    fields = vars(step)
    steps = {name: replace(step, gate=gate) for name, gate in GATES.items()}
    return {**steps, "normed input": NormedInput(**fields), "after o_proj": AfterOutput(**fields)}


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("wrong", [*GATES, "normed input", "after o_proj"])
def test_a_wrong_gate_is_found(make_case: Any, assert_rows_close: Any, name: str, wrong: str) -> None:
    for attention in PATHS:
        case = make_case(*STEP, CONFIGS[name], attention=attention)
        case.layer.step = wrong_steps(case.layer.step)[wrong]
        with pytest.raises(AssertionError, match=r"worst row error|NaN or infinity"):
            assert_rows_close(case.run(), case.truth(), VISIBLE)


def leave(factor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    return lambda self, out, lse: out.mul_(factor(lse, self.vectors["sinks"])[..., None])


SINKS = {
    "left out": leave(lambda lse, sinks: torch.ones_like(lse)),
    "of another head": leave(lambda lse, sinks: (lse - sinks.roll(1) - torch.arange(5)).sigmoid()),
    "scaled as logits of keys": leave(lambda lse, sinks: (lse - sinks * 24**-0.5).sigmoid()),
    "their own share": leave(lambda lse, sinks: (sinks - lse).sigmoid()),
    "to base 2": leave(lambda lse, sinks: ((lse - sinks) * 0.6931).sigmoid()),
}


@pytest.mark.parametrize("wrong", SINKS)
def test_wrong_sinks_are_found(
    make_case: Any, assert_rows_close: Any, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(PackedWeights, "leave_to_sinks", SINKS[wrong])
    for attention in PATHS:
        case = make_case(*STEP, CONFIGS["sinks"], attention=attention)
        with pytest.raises(AssertionError, match="worst row error"):
            assert_rows_close(case.run(), case.truth(), VISIBLE)


def test_sinks_take_their_share_of_a_context_in_rounds(make_case: Any, assert_rows_close: Any) -> None:
    config = CONFIGS["sinks"]
    case = make_case(*STEP, config)
    layer = mla.MLA(
        config, dtype=torch.float32, attention="expanded", workspace_bytes=rebuilt_bytes(config, 4, 16)
    )
    layer.load_state_dict(case.state)
    assert_rows_close(
        layer(case.hidden, case.batch, case.cache.pages[0]), case.truth(), LAYER_BOUND[torch.float32]
    )


class Mute(type(REFERENCE["latent_attention"])):  # type: ignore[misc]
    writes_lse = False


def test_an_op_without_a_log_sum_exp_serves_no_sinks() -> None:
    backend = HostBackend(ops={"mute": Mute()})
    layer = mla.MLA(CONFIGS["sinks"], backend=backend)
    assert layer.ops.names()["latent_attention"] == "reference"
    reason = "it writes no log-sum-exp, which sinks need for their share (sink_logits)"
    assert f"  fused op 'mute' not used because {reason}" in layer.ops.explain()
    with pytest.raises(
        UnsupportedOps, match=r"--ops mute requires one: fused op 'mute' not used because it "
    ):
        mla.MLA(CONFIGS["sinks"], backend=backend, ops="mute")
    assert mla.MLA(CONFIGS["ling"], backend=backend).ops.names()["latent_attention"] == "mute"


@pytest.mark.parametrize("attention", PATHS)
def test_channels_that_are_kept_are_not_rotated(
    make_case: Any, assert_rows_close: Any, attention: str
) -> None:
    config = CONFIGS["kimi"]
    case = make_case(*STEP, config, attention=attention, layer_config=replace(config, rope_theta=1e4))
    with pytest.raises(AssertionError, match="worst row error"):
        assert_rows_close(case.run(), case.truth(), VISIBLE)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_repeated_step_of_a_backend_s_ops_is_still_right(
    make_case: Any, assert_rows_close: Any, name: str
) -> None:
    """A backend may run a repeated step in one call of its own, which holds no gate."""
    config = replace(
        CONFIGS[name], kv_lora_rank=64, qk_rope_head_dim=min(32, 4 * CONFIGS[name].qk_rope_head_dim)
    )
    case = make_case([1, 1], [40, 7], config, dtype=torch.bfloat16)
    layer = mla.MLA(config, backend=mla.load_backend("cpu"))
    layer.load_state_dict(case.state)
    for _ in range(4):
        out = layer(case.hidden, case.batch, case.cache.pages[0])
        assert_rows_close(out, case.truth(), LAYER_BOUND[torch.bfloat16])


def test_ops_without_rotary_channels_are_the_reference_s_and_say_why(make_case: Any) -> None:
    ops = {kind: REFERENCE[kind] for kind in ("latent_attention", "write_latent", "rotate_query", "linear")}
    case = make_case([1], [9], CONFIGS["no rope"], ops=ops)
    names = case.layer.ops.names()
    assert {names[role] for role in ("latent_attention", "write_latent", "rotate_query")} == {"reference"}
    assert names["o_proj"] == "linear"
    assert (
        "  fused op 'write_latent' not used because write_latent promises ops rotary channels, and this "
        "layer has none (qk_rope_head_dim 0)"
    ) in case.layer.ops.explain()
    with pytest.raises(UnsupportedOps, match="and this layer has none"):
        mla.MLA(CONFIGS["no rope"], backend=HostBackend(ops=ops), ops="fused")
