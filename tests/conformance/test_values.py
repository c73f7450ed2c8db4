"""What cases hold: finite numbers, and memory around outputs that takes stray writes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from flash import Flash
from wrong_ops.places import rounds_rows_up

from mla.cases.case import OpCase
from mla.cases.memory import Layout
from mla.cases.played import CPU, Host, Laid, Scene
from mla.cases.stress import PATTERNS, UNUSUAL, Stress
from mla.conformance.checks import ops as reach
from mla.conformance.suite import trials
from mla.conformance.trial import BackendUnderTest
from mla.reference import REFERENCE
from mla_backends.api import AttentionSpec, NormSpec

SPEC = AttentionSpec(2, 32, 400, 8, 12, 0.5 * 408**-0.5, torch.float16, CPU)


@pytest.mark.parametrize("alike", [True, False])
def test_weights_of_fp16_may_underflow(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of zeros has nearly all the weight, so that what counts is left to subnormal weights."""
    case = OpCase("latent_attention", SPEC, (1,), (41,), stress=Stress())
    given = Host(case).given
    given["q"][:], given["keys"][:, 1:] = 0, given["keys"][1 if alike else slice(None), 1:]
    given["q"][..., -1] = 1
    given["keys"][:, -1] = -12 / SPEC.softmax_scale
    given["keys"][0] = 0
    given["keys"][1:, -1] *= 1 if alike else torch.linspace(0.9, 1.1, 40)
    flash = Flash("latent_attention/1", 64, 1)
    assert Laid(case, flash, host=Host(case, given)).call() == ""
    monkeypatch.setattr("mla.cases.kinds.lost_weights", torch.zeros_like)
    assert "rows are wrong" in Laid(case, flash, host=Host(case, given)).call()


@pytest.mark.parametrize(("keys", "logit"), [(5, -200), (41, -2000), (2, -90)])
def test_weights_may_be_held_at_the_smallest_normal_number(keys: int, logit: float) -> None:
    """A key of zeros has all the weight, and an exp that is bounded below gives the others 2^-126."""
    case = OpCase("latent_attention", replace(SPEC, dtype=torch.bfloat16), (1,), (keys,), stress=Stress())
    given = Host(case).given
    given["q"][:], given["keys"][0] = 0, 0
    given["q"][..., -1] = 1
    given["keys"][1:, -1] = logit / SPEC.softmax_scale
    host = Host(case, given)
    values = given["keys"][1:, : SPEC.kv_lora_rank].float().sum(0)

    class Held(Flash):
        factor = 1.0

        def attend(self, *arguments: Any) -> None:
            super().attend(*arguments)
            arguments[-2][:] = self.factor * torch.finfo(torch.float32).tiny * values

    op = Held("latent_attention/1", 64, 1)
    assert Laid(case, op, host=host).call() == ""
    op.factor = 1000.0
    assert "rows are wrong" in Laid(case, op, host=host).call()


@pytest.mark.parametrize("kind", ["latent_attention", "expanded_attention"])
def test_a_small_scale_asks_for_no_query_beyond_fp16(kind: str) -> None:
    for pattern in [name for name in PATTERNS if kind in UNUSUAL[name][0]]:
        case = OpCase(kind, SPEC, (2, 1), (5, 9), stress=Stress(), values=(pattern,))
        host = Host(case)
        for tensors in (host.given, host.truth):
            assert all(bool(numbers.isfinite().all()) for numbers in tensors.values()), pattern


def test_operands_leave_room_for_an_op_that_doubles_them_in_their_dtype() -> None:
    case = OpCase("latent_attention", SPEC, (2, 1), (5, 9), stress=Stress(), values=("steep logits",))
    given = Host(case).given
    assert given["q"].abs().max() > 10_000  # what the small scale asks for is cut
    assert all(bool((2 * numbers).isfinite().all()) for numbers in given.values())


def test_a_large_row_of_large_rows_stays_finite_in_fp16() -> None:
    spec = NormSpec(64, torch.float16, CPU)
    case = OpCase("rms_norm", spec, (5,), (5,), stress=Stress(size=300.0), values=("one large row",))
    assert all(bool(numbers.isfinite().all()) for numbers in Host(case).given.values())


NORM = OpCase("rms_norm", NormSpec(7168, torch.float32, CPU), (3,), (3,), stress=Stress())


def test_rows_behind_a_wide_output_are_the_suites_own() -> None:
    assert (
        Laid(NORM, rounds_rows_up("rms_norm", 32)).call() == "memory behind the last row of `out` was written"
    )
    piece = Laid(NORM, REFERENCE["rms_norm"]).pieces["out"]
    assert piece.whole.numel() - piece.part.storage_offset() >= (3 + 32) * 7168


def test_outputs_far_apart_are_filled_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack may count places in 32 bits: then one call fills others."""
    fill = torch.Tensor.fill_

    def nearby(tensor: torch.Tensor, value: Any) -> torch.Tensor:
        assert tensor.stride(0) < 1 << 20
        return fill(tensor, value)

    monkeypatch.setattr(torch.Tensor, "fill_", nearby)
    case = OpCase("expanded_attention", SPEC, (2, 1), (5, 9), stress=Stress(), layout=Layout(apart=1 << 20))
    for held in (math.nan, 1.0):
        out = Laid(case, REFERENCE[case.kind], Scene((case,), held=held)).arguments["out"]
        assert torch.equal(out.isnan(), torch.full(out.shape, math.isnan(held)))


def test_rows_far_apart_are_copied_one_by_one(
    sound: Any, judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack that counts places in 32 bits would spoil what an op is judged by."""
    copy, to_host = torch.Tensor.copy_, torch.Tensor.cpu

    def nearby(tensor: torch.Tensor) -> torch.Tensor:
        assert len(tensor) < 2 or tensor.stride(0) < 1 << 20
        return tensor

    monkeypatch.setattr(reach, "PLACES", (1 << 23,))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, of, *how: copy(nearby(to), of, *how))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: to_host(nearby(tensor)))
    (result,) = judge(sound(), "linear.far_rows")
    assert (result.status, result.reason) == ("pass", "")


def test_a_device_does_not_compute_the_errors_it_may_have(sound: Any) -> None:
    case = NORM.but(device=torch.device("meta"), layout=Layout(page_size=16))
    subject = BackendUnderTest(sound(), "sound")
    (trial,) = trials(subject, (torch.float32,), ["rms_norm.formula[reference-*"])
    trial.subject.backend.device = torch.device("meta")
    given = Host(NORM).given
    host = trial.serve(case, given=given).pool
    assert host.case.spec.device == CPU
    assert host.case.layout == Layout()
