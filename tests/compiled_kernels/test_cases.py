"""A launch is compiled as Triton's JIT would compile it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.triton.cases import Target, case_of
from benchmarks.triton.recording import Launch, Recorder
from benchmarks.triton.sources import specialised
from mla_backends.triton_ops.pointwise import RmsNorm

SM_90 = Target("cuda", 90, 32)


def _parameter(name: str, *, constant: bool = False, free: bool = False) -> Any:
    return SimpleNamespace(name=name, is_constexpr=constant, do_not_specialize=free)


@pytest.mark.parametrize(
    ("argument", "kind", "divisible"),
    [
        ({"pointer": "bf16", "aligned": True}, "*bf16", True),
        ({"pointer": "i32", "aligned": False}, "*i32", False),
        ({"value": 576}, "i32", True),
        ({"value": 577}, "i32", False),
        ({"value": 1 << 31}, "i64", True),
        ({"value": 0.5}, "fp32", False),
        ({"value": True}, "i1", False),
    ],
)
def test_what_code_knows_of_an_argument(argument: dict[str, Any], kind: str, divisible: bool) -> None:
    known = specialised([_parameter("x")], {"x": argument})
    assert known.signature == {"x": kind}
    assert known.divisible == (["x"] if divisible else [])
    assert known.constants == {}


@pytest.mark.parametrize(("value", "constant"), [(1, False), (None, False), ("plain", True), (576, True)])
def test_what_is_compiled_in(value: Any, constant: bool) -> None:
    known = specialised([_parameter("x", constant=constant)], {"x": {"value": value}})
    assert known.constants == {"x": value}
    assert known.signature == {}


@pytest.mark.parametrize("value", [1, 16])
def test_what_changes_from_step_to_step_is_not_specialised(value: int) -> None:
    known = specialised([_parameter("x", free=True)], {"x": {"value": value}})
    assert known.signature == {"x": "i32"}
    assert known.constants == {}
    assert known.divisible == []


def test_a_recorder_starts_nothing_and_keeps_what_it_was_told() -> None:
    recorder, x = Recorder(), torch.zeros(3, 48, dtype=torch.bfloat16)
    out = torch.full_like(x, torch.nan)
    RmsNorm(recorder)(x=x, weight=x[0], eps=1e-6, out=out)
    (launch,) = recorder.recorded
    assert launch.grid == (3,)
    assert launch.arguments["out"] is out
    assert bool(out.isnan().all())
    case = case_of(launch, SM_90)
    assert case.kernel == "mla_backends.triton_ops.jit.pointwise:rms_norm"
    assert case.arguments["x_row"] == {"value": 48}


def test_a_slice_may_be_unaligned() -> None:
    x = torch.zeros(2, 48, dtype=torch.bfloat16)
    kernel = SimpleNamespace(fn=SimpleNamespace(__module__="m", __name__="k"))
    launch = Launch(kernel, (1,), {"whole": x, "part": x[:, 1:]}, 4, 1)
    arguments = case_of(launch, SM_90).arguments
    assert [arguments[name]["aligned"] for name in ("whole", "part")] == [True, False]
