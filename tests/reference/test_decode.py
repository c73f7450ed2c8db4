"""Decode in fixed shapes against float64, on the host: what a device runs, and what a graph would capture."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla.bench.workload.workload_file import STANDARD, read_workload
from mla.reference import REFERENCE
from mla.reference import attention as decode
from mla.reference.attention import DecodeState

Latent = type(REFERENCE["latent_attention"])
DEVICE = torch.device("meta")  # any that is not the CPU; only its type is looked at
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1.05 * 2.0**-8}


class OnDevice(Latent):  # type: ignore[misc, valid-type]
    """The reference, planned as on a device."""

    padded = True

    def prepare(self, spec: Any, batch: Any) -> Any:
        state = super().prepare(replace(spec, device=DEVICE), batch)
        assert isinstance(state, DecodeState) == self.padded
        return state


@pytest.fixture(scope="session")
def check(latent_problem: Any, assert_rows_close: Any) -> Callable[..., None]:
    """Return a check of a decode step; slots and pages that no request owns are NaN."""

    def check(
        query_lens: list[int], kv_lens: list[int], dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        problem = latent_problem(query_lens, kv_lens, dtype=dtype, **options)
        (out, lse), (true_out, true_lse) = problem.run(OnDevice()), problem.truth()
        assert_rows_close(out, true_out, BOUND[dtype])
        assert torch.equal(lse == -torch.inf, true_lse == -torch.inf)
        gap = torch.where(true_lse == -torch.inf, 0.0, lse - true_lse).abs()
        assert gap.max() <= 1e-5, "worst lse error is too large"

    return check


def steps(check: Callable[..., None]) -> None:
    """Run the steps in which the classic bugs show."""
    for dtype in BOUND:
        check([1] * 6, [33, 16, 47, 3, 65, 1], dtype)
        check([1, 1, 1], [0, 7, 0], dtype)
        check([3, 3, 3], [40, 3, 18], dtype)
        check([2, 2], [0, 2], dtype)


def test_a_decode_step_is_exact_to_rounding(check: Any) -> None:
    steps(check)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_decode_step(check: Any, data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, decode.MOST_QUERIES))
    lengths = st.one_of(st.just(0), st.integers(queries, 70))
    kv_lens = data.draw(st.lists(lengths, min_size=1, max_size=6))
    heads, page_size = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 4, 16, 64]))
    check([queries] * len(kv_lens), kv_lens, heads=heads, page_size=page_size)


def test_parts_that_are_attended_one_by_one_change_nothing(
    check: Any, latent_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = latent_problem([2] * 5, [33, 16, 47, 0, 65])
    whole = problem.run(OnDevice())
    monkeypatch.setattr(decode, "KEYS_BYTES", 2 * 8 * 40 * 80)  # two requests of five pages
    state = OnDevice().prepare(problem.spec, problem.view)
    assert [part.stop - part.start for part in state.parts] == [2, 2, 1]
    torch.testing.assert_close(problem.run(OnDevice()), whole, atol=1e-6, rtol=1e-6)
    steps(check)


def test_a_nan_that_a_request_owns_is_not_hidden(latent_problem: Any) -> None:
    problem = latent_problem([1, 1], [20, 40])
    page = problem.view.block_table[1, 0]
    problem.cache[page, 3] = torch.nan
    out, _ = problem.run(OnDevice())
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


REFUSED = {
    "a prefill": ([9, 9], [9, 9]),
    "different numbers of new tokens": ([1, 2], [9, 9]),
    "a token without keys next to one with keys": ([3, 3], [2, 9]),
    "no new tokens": ([1, 0], [9, 9]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_batches_are_grouped(case: str, latent_problem: Any, assert_rows_close: Any) -> None:
    op, problem = OnDevice(), latent_problem(*REFUSED[case])
    op.padded = False
    assert_rows_close(problem.run(op)[0], problem.truth()[0], BOUND[torch.float32])


@pytest.mark.parametrize(
    ("lengths", "padded"),
    [
        ([400] * 4 + [50] * 4, True),
        ([4000] + [1000] * 15, True),
        ([4000] + [100] * 15, False),  # mostly padding
        ([60] + [1] * 15, True),  # mostly padding, and little of it
    ],
)
def test_padding_has_a_limit(lengths: list[int], padded: bool, latent_problem: Any) -> None:
    problem = latent_problem([1] * len(lengths), lengths)
    wide = replace(problem.spec, device=DEVICE, kv_lora_rank=512, qk_rope_head_dim=64)
    state = Latent().prepare(wide, problem.view)
    assert isinstance(state, DecodeState) == padded


@pytest.mark.parametrize("heads", [16, 128])
def test_one_graph_serves_the_standard_decode(heads: int, latent_problem: Any) -> None:
    """In a block table as wide as the last step needs, every step takes the same launches."""
    (scenario,) = (candidate for candidate in read_workload(STANDARD).scenarios if candidate.mode == "decode")
    states, widest = set(), -(-max(scenario.final_lens) // 64)
    for step in (0, 15, scenario.inputs - 1):
        problem = latent_problem(scenario.query_lens, scenario.kv_lens(step), page_size=64)
        shape = {"num_heads": heads, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
        problem.view.block_table = torch.zeros(len(scenario.query_lens), widest, dtype=torch.int32)
        state = decode.fixed_shapes(replace(problem.spec, device=DEVICE, **shape), problem.view)
        assert state is not None, f"step {step} is grouped"
        states.add((str(state.parts), state.keys, state.queries))
    assert len(states) == 1


def test_a_request_whose_logits_exceed_the_cap_is_grouped_and_so_is_any_on_the_cpu(
    latent_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = latent_problem([1], [40])
    assert decode.fixed_shapes(problem.spec, problem.view) is None
    monkeypatch.setattr(decode, "LOGITS_BYTES", 8 * 3 * 48 - 1)
    assert decode.fixed_shapes(replace(problem.spec, device=DEVICE), problem.view) is None


# ------------------------------------------------------------------------------------- what a graph repeats


def replayed(problem: Any, later: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a captured call gives once another step's numbers are in its place."""
    op = OnDevice()
    state = op.prepare(problem.spec, problem.view)
    monkeypatch.setattr(decode, "capturing", lambda device: True)
    for name in ("block_table", "kv_lens_device"):
        getattr(problem.view, name).copy_(getattr(later.view, name))
    out, lse = torch.full_like(later.q[..., :32], torch.nan), torch.full(later.q.shape[:2], torch.nan)
    tables = {"block_table": problem.view.block_table, "kv_lens": problem.view.kv_lens_device}
    op(
        state, q=later.q, cache=later.cache, cu_q=later.view.cu_q, out=out, lse=lse,
        softmax_scale=later.spec.softmax_scale, **tables,
    )  # fmt: skip
    return out, lse


@pytest.mark.parametrize("mutant", [False, True], ids=["right", "masks of the batch that was captured"])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_captured_call_follows_its_batch(
    queries: int, mutant: bool, latent_problem: Any, assert_rows_close: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = latent_problem([queries] * 4, [60, 10, 5, 33])
    state = OnDevice().prepare(problem.spec, problem.view)
    assert state.graph_safe
    later = latent_problem([queries] * 4, [7, 64, 0, 34], seed=1)
    true_out, true_lse = later.truth()
    if mutant:
        monkeypatch.setattr(OnDevice, "prepare", lambda *given: replace(state, captured=True))
    out, lse = replayed(problem, later, monkeypatch)
    with pytest.raises(AssertionError, match=r"worst row error|NaN") if mutant else nullcontext():
        assert_rows_close(out, true_out, BOUND[torch.float32])
    assert mutant or torch.equal(lse == -torch.inf, true_lse == -torch.inf)


def test_masks_that_a_graph_makes_are_not_made_twice(
    latent_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning is captured with the forward."""
    monkeypatch.setattr(decode, "capturing", lambda device: True)
    problem, op = latent_problem([1, 1], [20, 40]), OnDevice()
    state = op.prepare(problem.spec, problem.view)
    monkeypatch.setattr(decode, "_masks", lambda *given: pytest.fail("made again"))
    assert state.captured
    problem.run(type("Planned", (Latent,), {"prepare": lambda *given: state})())


# -------------------------------------------------------------------------------------------------- mutants


def shifted(by: int) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        masks = decode._masks
        patch.setattr(decode, "_masks", lambda lens, *shape: masks((lens + by).clamp(min=0), *shape))

    return mutate


def unmasked(field: str) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        masks = decode._masks

        def wrong(*given: Any) -> Any:
            made = masks(*given)
            return made._replace(**{field: torch.zeros_like(getattr(made, field))})

        patch.setattr(decode, "_masks", wrong)

    return mutate


def one_query(patch: pytest.MonkeyPatch) -> None:
    """All new tokens see what the last one sees."""
    masks = decode._masks
    patch.setattr(decode, "_masks", lambda lens, keys, queries: masks(lens, keys, 1))


def multiplied(patch: pytest.MonkeyPatch) -> None:
    """Padding is multiplied by zero, which NaN survives."""
    patch.setattr(torch.Tensor, "masked_fill_", lambda x, mask, value: x.mul_(~mask) if value == 0 else x)


MUTANTS = {
    "a key too few": shifted(-1),
    "a key too many": shifted(1),
    "padding kept": unmasked("foreign"),
    "padding seen": unmasked("bias"),
    "no causality": one_query,
    "multiplied": multiplied,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_fails_a_wrong_mask(check: Any, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    with pytest.raises(AssertionError):
        steps(check)
