"""The FlashInfer adapter on fakes of three releases: ragged batches, base 2, plans that take turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_backends.kernels import FlashInferMla, KernelRefused, flashinfer

RELEASES = ("flashinfer", "flashinfer_old", "flashinfer_07")
each_release = pytest.mark.parametrize("release", RELEASES)
requests = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 140)), min_size=1, max_size=5)


@pytest.fixture(autouse=True, scope="module")
def small_workspace() -> Any:
    """Do without 128 MiB that the fakes never touch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer, "WORKSPACE_BYTES", 1024)
        yield


@each_release
def test_every_kind_of_batch_is_right(installed: Any, check_latent: Any, release: str) -> None:
    with installed(release):
        op = FlashInferMla()
        check_latent(op, heads=(1, 4, 16, 128))
        for page_size in (1, 16):
            check_latent(op, dtype=torch.float16, page_size=page_size)


@each_release
@settings(max_examples=20, deadline=None)
@given(drawn=requests, page_size=st.sampled_from([1, 8, 64]), seed=st.integers(0, 99))
def test_any_lengths_are_right(
    installed: Any,
    make_problem: Any,
    assert_right: Any,
    release: str,
    drawn: Any,
    page_size: int,
    seed: int,
) -> None:
    query_lens, kv_lens = [new for new, _ in drawn], [new + old for new, old in drawn]
    if sum(query_lens) == 0:
        query_lens[0], kv_lens[0] = 1, kv_lens[0] + 1
    with installed(release):
        problem = make_problem(query_lens, kv_lens, page_size=page_size, seed=seed)
        assert_right(problem.run(FlashInferMla()), problem.truth())


@each_release
def test_strided_outputs(installed: Any, make_problem: Any, assert_right: Any, release: str) -> None:
    with installed(release):
        problem = make_problem([3, 1], [40, 70])
        room = torch.full((4, 17, 544), torch.nan, dtype=torch.bfloat16)
        assert_right(problem.run(FlashInferMla(), out=room[:, :16, 16:528]), problem.truth())
        room[:, :16, 16:528] = torch.nan
        assert room.isnan().all(), "memory beside out was written"


def test_a_strided_log_sum_exp(installed: Any, make_problem: Any, assert_right: Any) -> None:
    with installed("flashinfer"):
        op, problem = FlashInferMla(), make_problem([3, 1], [40, 70])
        out, room = torch.empty(4, 16, 512, dtype=torch.bfloat16), torch.full((4, 20), torch.nan)
        op(
            op.prepare(problem.spec, problem.view),
            q=problem.q,
            cache=problem.cache,
            block_table=problem.view.block_table,
            kv_lens=problem.view.kv_lens_device,
            cu_q=problem.view.cu_q,
            softmax_scale=problem.spec.softmax_scale,
            out=out,
            lse=room[:, 2:18],
        )
        assert_right((out, room[:, 2:18]), problem.truth())
        assert room[:, [0, 1, 18, 19]].isnan().all()


def test_layers_share_one_plan(installed: Any, make_problem: Any) -> None:
    with installed("flashinfer") as fakes:
        op, problem = FlashInferMla(), make_problem([1, 2], [33, 64])
        state = op.prepare(problem.spec, problem.view)
        for _ in range(3):
            problem.run(op, state)
        assert (fakes.CALLS["plan"], fakes.CALLS["run"]) == (1, 3)


def test_many_batches_at_a_time_stay_right_with_few_wrappers(
    installed: Any, make_problem: Any, assert_right: Any
) -> None:
    """A wrapper holds one plan; a state whose plan was replaced is planned again."""
    with installed("flashinfer") as fakes:
        op = FlashInferMla()
        problems = [make_problem([1, 2], [33 + i, 64 + i], seed=i) for i in range(flashinfer.TURNS + 2)]
        states = [op.prepare(problem.spec, problem.view) for problem in problems]
        for problem, state in zip(problems * 2, states * 2, strict=True):
            assert_right(problem.run(op, state), problem.truth())
        assert fakes.CALLS["BatchMLAPagedAttentionWrapper"] == flashinfer.TURNS


class Event:
    """An event that says when it was waited for."""

    log: list[str] = []  # noqa: RUF012

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")


def test_a_wrapper_is_planned_again_only_when_its_last_plan_has_arrived(
    installed: Any, make_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device the plan's pinned memory is still being read when prepare() returns."""
    with installed("flashinfer"):
        problem = make_problem([1], [33])
        op = FlashInferMla()
        op.prepare(problem.spec, problem.view)
        for turn in op._pool(torch.device("cpu")).turns:
            turn._arrived = Event()
        Event.log.clear()
        for _ in range(flashinfer.TURNS):
            op.prepare(problem.spec, problem.view)
        assert Event.log == ["wait", "record"]  # the first wrapper's turn came again once


def test_the_plan_is_given_host_lengths_and_device_pages(installed: Any, make_problem: Any) -> None:
    """Lengths on the device would be copied back, and that waits for everything."""
    with installed("flashinfer"):
        problem = make_problem([1, 2], [33, 70])
        plan = FlashInferMla().prepare(problem.spec, problem.view).plan
        for name in ("qo_indptr", "kv_indptr", "kv_len_arr"):
            assert plan[name].device.type == "cpu"
        assert plan["kv_indices"].tolist() == problem.view.block_table[[0, 1, 1], [0, 0, 1]].tolist()


def test_more_new_tokens_than_keys_are_refused(installed: Any, make_spec: Any) -> None:
    with installed("flashinfer"):
        op, reason = FlashInferMla(), ["a request must not have more new tokens than keys"]
        assert op.unsupported_batch(make_spec(), [1, 3], [5, 2]) == reason
        assert op.unsupported_batch(make_spec(), [1, 2], [5, 0]) == reason
        assert op.unsupported_batch(make_spec(), [1, 1, 0], [5, 0, 0]) == []


def test_a_capture_and_another_scale_are_refused(
    installed: Any, make_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed("flashinfer"):
        op, problem = FlashInferMla(), make_problem([1], [33])
        state = op.prepare(problem.spec, problem.view)
        tensors = {
            "q": problem.q,
            "cache": problem.cache,
            "out": torch.empty(1, 16, 512, dtype=torch.bfloat16),
        }
        tables = {"block_table": problem.view.block_table, "kv_lens": problem.view.kv_lens_device}
        rest = {"cu_q": problem.view.cu_q, "lse": torch.empty(1, 16)}
        with pytest.raises(KernelRefused, match="a different softmax scale"):
            op(state, **tensors, **tables, **rest, softmax_scale=0.5)
        monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: True, raising=False)
        for call in (lambda: problem.run(op, state), lambda: op.prepare(problem.spec, problem.view)):
            with pytest.raises(KernelRefused, match="plans on the host"):
                call()


def test_it_pads_no_heads(installed: Any, make_spec: Any) -> None:
    from mla_backends.kernels import LatentLimits

    with installed("flashinfer"):
        op = FlashInferMla(LatentLimits(heads=(128,), pads_heads_to=(128,)))
        assert op.unsupported_reasons(make_spec()) == ["it serves 128 heads, not 16"]
