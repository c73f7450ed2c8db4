"""torch's own FlashAttention behind the contract, on two stand-ins for its kernel, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from float64_attention import attend_segments
from judged import faults, judged_op
from smaller_cases import make_smaller

from mla import MLA, MLAConfig
from mla_backends.api import SegmentLengths
from mla_backends.kernels import SdpaExpanded, TorchVarlen, VarlenLimits
from mla_backends.testing import HostBackend

FOLDER = "flash_attn_2"  # any: the stand-ins are in what all folders share
# Kernel -> the adapter that its plugin offers.
STACKS: dict[str, Callable[[], TorchVarlen]] = {
    "cuda": TorchVarlen,
    "musa": lambda: TorchVarlen(VarlenLimits(pads_values=False)),
}
each_stack = pytest.mark.parametrize("stack", STACKS)


@pytest.fixture(scope="session")
def stacked(installed: Any) -> Callable[[str], Any]:
    """Return a context in which torch has a flash attention on the host; it yields the stand-ins."""

    @contextmanager
    def stacked(kernel: str) -> Any:
        with installed(FOLDER) as fakes:
            from fake_kernels import torch_flash

            with torch_flash.registered(getattr(torch_flash, kernel), "CPU"):
                yield fakes

    return stacked


@each_stack
def test_one_launch_serves_all_segments_whether_or_not_lse_is_read(
    stacked: Any, make_spec: Any, stack: str
) -> None:
    spec, lengths = make_spec(num_heads=4), SegmentLengths((5, 1, 20), (9, 1, 33), True)
    q, k, v = (torch.randn(t, 4, d).bfloat16() for t, d in ((26, 192), (43, 192), (43, 128)))
    with stacked(stack) as fakes:
        op = STACKS[stack]()
        outs = [torch.full((26, 4, 128), math.nan, dtype=torch.bfloat16) for _ in range(2)]
        for out, lse in zip(outs, (torch.empty(26, 4), None), strict=True):
            before = fakes.CALLS["_flash_attention_forward"]
            op(op.prepare(spec, lengths), q=q, k=k, v=v, softmax_scale=0.1, out=out, lse=lse)
            assert fakes.CALLS["_flash_attention_forward"] == before + 1
        assert op.lse_optional
        assert torch.equal(*outs)


@pytest.mark.parametrize(("first", "more"), [(3, 8), (8, 13), (0, 1)])
@each_stack
def test_rows_that_start_anywhere_are_right(
    stacked: Any, make_spec: Any, assert_right: Any, stack: str, first: int, more: int
) -> None:
    """The kernels load 16 bytes at a time and do not check it."""
    spec, lengths = make_spec(num_heads=2), SegmentLengths((3, 2), (9, 2), True)
    wide = [torch.randn(t, 2, d + more).bfloat16() for t, d in ((5, 192), (11, 192), (11, 128))]
    parts = [tensor[..., first : first + tensor.shape[2] - more] for tensor in wide]
    out, lse = torch.full((5, 2, 128), math.nan, dtype=torch.bfloat16), torch.full((5, 2), math.nan)
    with stacked(stack):
        op = STACKS[stack]()
        q, k, v = parts
        op(op.prepare(spec, lengths), q=q, k=k, v=v, softmax_scale=0.1, out=out, lse=lse)
    split = zip(q.split([3, 2]), k.split([9, 2]), v.split([9, 2]), strict=True)
    assert_right((out, lse), attend_segments(split, 0.1))


@each_stack
def test_the_suite_that_judges_backends_passes(
    stacked: Any, stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_smaller(monkeypatch)
    with stacked(stack):
        results = judged_op(STACKS[stack](), "expanded.*", "layer.mixed*")
    assert faults(results) == []
    assert sum(result.status == "pass" for result in results) >= 5


# --------------------------------------------------------------------------------------- refusals


def test_a_device_without_the_kernel_is_a_reason_and_sdpa_runs() -> None:
    """This torch has none for the host."""
    config = MLAConfig(hidden_size=64, num_attention_heads=2)
    backend = HostBackend(ops={"torch_varlen": TorchVarlen(), "sdpa": SdpaExpanded()})
    choice = MLA(config, backend=backend).ops["expanded_attention"]
    assert choice.name == "sdpa"
    assert choice.reasons == (
        "fused op 'torch_varlen' not used because this torch has no flash attention of its own for devices "
        "of kind 'cpu'",
    )


def test_a_torch_without_the_operator_is_a_reason(make_spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_backends.kernels.expanded.OPERATOR", "_flash_attention_forwards")
    assert TorchVarlen().unsupported_reasons(make_spec()) == ["this torch has no _flash_attention_forwards"]


# -------------------------------------------------------------------------------------- preflight


@each_stack
def test_a_right_kernel_passes_its_preflight(stacked: Any, make_spec: Any, stack: str) -> None:
    random = torch.random.get_rng_state()
    with stacked(stack):
        for dtype in (torch.bfloat16, torch.float16):
            for widths in ({}, {"qk_nope_head_dim": 64, "v_head_dim": 96}, {"v_head_dim": 192}):
                assert STACKS[stack]().preflight(make_spec(dtype=dtype, **widths)) == []
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_kernel_aligned_at_the_first_key_is_refused(stacked: Any, make_spec: Any) -> None:
    with stacked("first_key"):
        assert TorchVarlen().unsupported_reasons(make_spec()) == []
        assert TorchVarlen().preflight(make_spec()) == [
            "torch's own flash attention gives wrong results (causal) on a tiny batch here; update the "
            "package, or use another op (`--ops reference` takes none of its kind)"
        ]


def test_a_build_without_the_kernel_is_refused(stacked: Any, make_spec: Any) -> None:
    with stacked("without_flash"):
        (reason,) = TorchVarlen().preflight(make_spec())
    assert reason == (
        "torch's own flash attention raises RuntimeError: USE_FLASH_ATTENTION was not enabled for build. on "
        "a tiny batch here; use a torch that is built with it, or another op (`--ops reference` takes none "
        "of its kind)"
    )


class NoScale(TorchVarlen):
    """The kernel's own scale, which is not that of a model with YaRN."""

    def attend(self, state: Any, given: Any, out: Any) -> Any:
        return super().attend(state, {**given, "scale": given["q"].shape[2] ** -0.5}, out)


class AlwaysMask(TorchVarlen):
    def attend(self, state: Any, *rest: Any) -> Any:
        return super().attend(replace(state, causal=True), *rest)


class StaleLogs(TorchVarlen):
    """What another call left is returned again."""

    _kept: Any = None

    def attend(self, *arguments: Any) -> Any:
        value, sums = super().attend(*arguments)
        self._kept = sums if self._kept is None else self._kept
        return value, self._kept


class ValuesBehind(TorchVarlen):
    """Values are padded in front and cut behind."""

    def attend(self, state: Any, given: Any, out: Any) -> Any:
        return super().attend(state, {**given, "v": given["v"].roll(192 - 128, dims=2)}, out)


@pytest.mark.parametrize("mutant", [NoScale, AlwaysMask, StaleLogs, ValuesBehind])
def test_the_preflight_fails_what_is_wrong(stacked: Any, make_spec: Any, mutant: type[TorchVarlen]) -> None:
    """It stands between an undocumented stack and wrong results, so it must see every kind of them."""
    with stacked("cuda"):
        assert TorchVarlen().preflight(make_spec()) == []
        (reason,) = mutant().preflight(make_spec())
    assert reason.startswith("torch's own flash attention gives ")
    assert (
        "(without a mask) on a tiny" if mutant in (AlwaysMask, StaleLogs) else "(causal) on a tiny"
    ) in reason
