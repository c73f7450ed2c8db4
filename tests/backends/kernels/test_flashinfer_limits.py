"""Where FlashInfer cannot run, or runs and is wrong: every such layer and batch is refused, and no other."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from judged import judged_op

from mla_backends.kernels import FlashInferMla, LatentLimits, flashinfer

CPU = torch.device("cpu")
RELEASES = ("flashinfer", "flashinfer_07")
each_release = pytest.mark.parametrize("release", RELEASES)


@pytest.fixture(autouse=True, scope="module")
def hopper() -> Any:
    """Let the CPU have a Hopper's multiprocessors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer, "multiprocessors", lambda device: 132)
        yield


# ---------------------------------------------------------------------------------------- a token's last key


@each_release
@pytest.mark.parametrize("heads", [12, 40, 96])
def test_heads_that_tiles_would_cut_are_padded(
    installed: Any, make_problem: Any, assert_right: Any, release: str, heads: int
) -> None:
    with installed(release):
        op = FlashInferMla()
        for query_lens, kv_lens in (([1, 1], [65, 64]), ([70, 3, 1], [70, 65, 129])):
            problem = make_problem(query_lens, kv_lens, heads=heads)
            assert op.unsupported_reasons(problem.spec) == []
            assert op.unsupported_batch(problem.spec, query_lens, kv_lens, 64) == []
            assert_right(problem.run(op), problem.truth())


@each_release
def test_requests_without_new_tokens_cut_no_tiles(
    installed: Any, make_problem: Any, assert_right: Any, release: str
) -> None:
    """Planned as well, they would make tiles too small for a token of 128 heads."""
    with installed(release):
        op, query_lens, kv_lens = FlashInferMla(), (0, 1, 0, 3, 0), (5, 65, 5, 70, 0)
        problem = make_problem(query_lens, kv_lens, heads=128)
        assert op.unsupported_batch(problem.spec, query_lens, kv_lens, 64) == []
        assert_right(problem.run(op), problem.truth())
        (reason,) = op.unsupported_reasons(replace(problem.spec, num_heads=192))
        assert reason == "it serves 1, 2, 4, 8, 16, 32, 64 or 128 heads, not 192"


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from(flashinfer.HEADS),
    drawn=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 130)), min_size=1, max_size=4),
)
@example(heads=128, drawn=[(1, 64), (0, 5), (0, 5)])
def test_no_batch_loses_a_key(installed: Any, make_spec: Any, heads: int, drawn: Any) -> None:
    kv_lens = [new + old for new, old in drawn]
    table, spec = torch.zeros(len(drawn), 200, dtype=torch.int32), make_spec(num_heads=heads)
    batch: Any = SimpleNamespace(
        query_lens=[new for new, _ in drawn], kv_lens=kv_lens, block_table=table, page_size=1
    )
    with installed("flashinfer"):
        from fake_kernels.ragged_mla import Plan

        plan = Plan(**FlashInferMla()._state(spec, batch).plan)
        assert [page for request in range(len(plan.lens)) for page in plan.lost(request)] == []


# ------------------------------------------------------------------------------------------ parts of work


def parts(heads: int, query_lens: list[int], kv_lens: list[int], multiprocessors: int) -> int:
    """Count the parts as the scheduler does: a tile's keys in equal shares, or all of them."""
    tile = 128 if sum(query_lens) * heads // len(query_lens) > 64 else 64
    seen = []
    for count, keys in zip(query_lens, kv_lens, strict=True):
        tiles = -(-count * heads // tile)
        for i in range(1, tiles + 1):
            last = keys if i == tiles else min(keys, keys - count + -(-i * tile // heads))
            seen.append(max(0, last))
    clusters = multiprocessors // (tile // 64)
    share = max(1, -(-sum(seen) // clusters))
    small = ((8, 32), (16, 64), (32, 128), (64, 192))
    limit = next((most for up_to, most in small if share <= up_to), -(-share // 256) * 256)
    return sum(max(1, -(-keys // limit)) for keys in seen)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([1, 16, 20, 128]),
    drawn=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 9000)), min_size=1, max_size=40),
)
def test_the_bound_on_the_parts_of_a_plan_is_one(heads: int, drawn: Any) -> None:
    query_lens, kv_lens = [new for new, _ in drawn], [new + old for new, old in drawn]
    exact = parts(heads, query_lens, kv_lens, 132)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer, "WORK_ITEMS", exact - 1)
        (reason,) = flashinfer.work_reasons(heads, query_lens, CPU)
        assert f"its tables hold {exact - 1} parts" in reason
        patch.setattr(flashinfer, "WORK_ITEMS", exact + 132)
        assert flashinfer.work_reasons(heads, query_lens, CPU) == []


@pytest.mark.parametrize(
    ("heads", "query_lens", "most"),
    [(128, [16_384 - 66], 16_384 - 66), (16, [8 * (16_384 - 66)], 8 * (16_384 - 66))],
)
def test_tables_are_refused_before_they_overflow(
    installed: Any, make_spec: Any, heads: int, query_lens: list[int], most: int
) -> None:
    with installed("flashinfer"):
        op, spec = FlashInferMla(), make_spec(num_heads=heads)
        assert op.unsupported_batch(spec, [most], [most], 64) == []
        (reason,) = op.unsupported_batch(spec, [most + 1], [most + 1], 64)
        assert "may need 16385" in reason
        rows = 16_384 - 132
        assert op.unsupported_batch(make_spec(), [1] * rows, [5] * rows, 64) == []
        assert len(op.unsupported_batch(make_spec(), [1] * (rows + 1), [5] * (rows + 1), 64)) == 1


def ragged() -> Any:
    from fake_kernels import ragged_mla

    return ragged_mla


# ----------------------------------------------------------------------------------------------- preflight


@each_release
def test_a_kernel_that_works_passes_its_preflight(installed: Any, make_spec: Any, release: str) -> None:
    with installed(release):
        op = FlashInferMla()
        assert op.compiles
        for heads in (1, 128):
            assert op.preflight(make_spec(num_heads=heads)) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Ninja build failed. Ninja output:\n[1/4] c++ ...\nsh: 1: c++: not found"),
            "flashinfer.mla raises RuntimeError: Ninja build failed. Ninja output: on a tiny batch here; "
            "install the CUDA toolkit, or `pip install flashinfer-jit-cache --index-url "
            "https://flashinfer.ai/whl/cu128`",
        ),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB.\nSee docs"),
            "flashinfer.mla finds too little memory for a tiny batch here (OutOfMemoryError: CUDA out of "
            "memory. Tried to allocate 128.00 MiB.): free some, and start again",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile"),
            "flashinfer.mla fails on this device (RuntimeError: CUDA error: no kernel image is available for "
            "execution on the device): check that its package has kernels for this card, or run without it "
            "(`--ops reference`)",
        ),
        (
            ValueError("head_dim 576 is not supported"),
            "flashinfer.mla refuses a tiny batch here: flashinfer refuses this batch (ValueError: head_dim "
            "576 is not supported); update the package, or use another op (`--ops reference` takes none of "
            "its kind)",
        ),
    ],
)
def test_a_kernel_that_cannot_be_compiled_is_a_reason_with_its_cure(
    installed: Any, make_spec: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def plan(self: Any, **tables: Any) -> None:
        raise error

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with installed("flashinfer"):
        op = FlashInferMla()
        plan.__signature__ = inspect.signature(op.release.wrapper.plan)  # type: ignore[attr-defined]
        monkeypatch.setattr(op.release.wrapper, "plan", plan)
        assert op.unsupported_reasons(make_spec()) == []
        assert op.preflight(make_spec()) == [reason]
        assert op._wrappers == {}  # nor is its workspace kept


def test_a_kernel_that_runs_and_is_wrong_fails_its_preflight(
    installed: Any, make_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed("flashinfer"):
        monkeypatch.setattr(ragged(), "run", lambda plan, *tensors: tensors[4].zero_())
        assert FlashInferMla().preflight(make_spec()) != []


@pytest.mark.parametrize(
    ("version", "old"),
    [("0.6.10.post1", True), ("0.6.11", False), ("0.7.2.post1", False), ("0.10.0", False), ("", False)],
)
def test_a_release_that_loses_its_way_in_large_caches_is_refused(
    installed: Any, make_spec: Any, version: str, old: bool
) -> None:
    with installed("flashinfer"):
        importlib.import_module("flashinfer").__version__ = version  # type: ignore[attr-defined]
        why = f"flashinfer {version} reads other pages in large caches: use 0.6.11 or newer"
        assert FlashInferMla().unsupported_reasons(make_spec()) == [why] * old


# ------------------------------------------------------------------------------------ the plan of a step


@each_release
def test_the_log_sum_exp_is_left_out_where_nobody_reads_it(
    installed: Any, make_problem: Any, assert_right: Any, release: str
) -> None:
    """What a plan is made for is what the last call asked; no step is planned twice."""
    with installed(release) as fakes:
        op = FlashInferMla()
        assert op.lse_optional
        for with_lse in (False, False, True, True, False, False):
            problem = make_problem([3, 1, 1], [70, 33, 0])
            state = op.prepare(problem.spec, problem.view)
            for _ in range(2):
                outputs = problem.run(op, state) if with_lse else problem.run(op, state, lse=None)
            assert_right(outputs, problem.truth(), with_lse)
        assert fakes.CALLS["plan"] == 6 + (2 if release == "flashinfer_07" else 0)  # when it changes its mind


class Unfenced(FlashInferMla):
    """Serves whatever it is given."""

    def __init__(self) -> None:
        super().__init__(LatentLimits(page_sizes=None))

    def unsupported_batch(self, *lengths: Any) -> list[str]:
        return []


def test_the_suite_finds_out_an_adapter_without_these_limits(installed: Any) -> None:
    with installed("flashinfer"):
        (right,), (wrong,) = (
            judged_op(op, "latent.tiles[op-bfloat16]") for op in (FlashInferMla(), Unfenced())
        )
    assert right.cases.failed == 0 < wrong.cases.failed
    assert wrong.cases.refused == 0
    assert "raised" not in wrong.reason
