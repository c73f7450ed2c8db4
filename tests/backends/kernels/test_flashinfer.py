"""The FlashInfer adapter on fakes of two releases: ragged batches, base 2, plans that take turns."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_adapters import Launches

from mla.cache.formats import find_format, given_back
from mla_backends.api import format_refusals
from mla_backends.kernels import (
    FlashInferMla,
    FlashInferSparse,
    FlashMla,
    FlashMlaSparse,
    IxformerMla,
    KernelRefused,
    TokenspeedMla,
    flashinfer,
)


def pages(table: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """Return the first pages of each row, as a plan gathers them."""
    rows = tuple(row * table.shape[1] for row in range(len(counts)))
    return table.reshape(-1).index_select(0, flashinfer._places(rows, counts, table.device))


def test_a_strided_log_sum_exp(installed: Any, make_problem: Any, assert_right: Any) -> None:
    with installed("flashinfer"):
        problem, room = make_problem([3, 1], [40, 70]), torch.full((4, 20), torch.nan)
        assert_right(problem.run(FlashInferMla(), lse=room[:, 2:18]), problem.truth())
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
            turn.arrived = Event()
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


def test_a_capture_is_refused(installed: Any, make_problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed("flashinfer"):
        op, problem = FlashInferMla(), make_problem([1], [33])
        state = op.prepare(problem.spec, problem.view)
        monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: True, raising=False)
        for call in (lambda: problem.run(op, state), lambda: op.prepare(problem.spec, problem.view)):
            with pytest.raises(KernelRefused, match="plans on the host"):
                call()


@pytest.mark.parametrize("counts", [(0, 0), (3,), (0, 2, 0, 1), (4, 4, 4), (1, 0)])
def test_pages_are_those_of_each_request_in_order(counts: tuple[int, ...]) -> None:
    table = torch.randperm(4 * len(counts)).int().view(len(counts), 4)
    wide = torch.nn.functional.pad(table, (0, 3))[:, :4]  # a table may be a slice of a wider one
    rows = [row[:count] for row, count in zip(table, counts, strict=True)]
    for given in (table, wide):
        assert torch.equal(pages(given, counts), torch.cat(rows))


def test_equal_counts_share_the_places_and_never_the_pages() -> None:
    """The next step of the same requests may find other pages in its table, at the same places.

    Nothing is read back from the device.
    """
    flashinfer._places.cache_clear()
    table = torch.arange(12, dtype=torch.int32).view(2, 6)
    with Launches() as first:
        assert pages(table, (3, 2)).tolist() == [0, 1, 2, 6, 7]
    assert not {"_local_scalar_dense", "item", "nonzero"} & set(first.count)
    with Launches() as again:
        assert pages(table + 100, (3, 2)).tolist() == [100, 101, 102, 106, 107]
    assert again.count["index_select"] == 1
    assert not {"arange", "repeat_interleave", "_to_copy"} & set(again.count)
    assert pages(table, (2, 3)).tolist() == [0, 1, 6, 7, 8]  # as many, elsewhere
    wide = torch.arange(16, dtype=torch.int32).view(2, 8)
    assert pages(wide, (2, 3)).tolist() == [0, 1, 8, 9, 10]
    assert pages(table[:1], (2,)).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["fp8", "fp8:0.3"])
def test_an_e4m3_cache_is_read_with_its_scale(
    installed: Any, make_problem: Any, assert_right: Any, name: str
) -> None:
    with installed("flashinfer_07"):
        problem, codec = make_problem([3, 1, 2], [40, 70, 64]), find_format(name).codec(512, 64)
        rows = codec.encode(*problem.cache.flatten(0, 1).split([512, 64], dim=1))
        problem.cache = rows.unflatten(0, problem.cache.shape[:2])
        problem.spec = replace(problem.spec, cache_format=name, token_bytes=codec.token_bytes)
        owned = [given_back(codec, *rows.split([512, 64], dim=1)) for rows in problem.owned]
        problem.owned = [torch.cat(parts, dim=1) for parts in owned]
        assert_right(problem.run(FlashInferMla(), cache_format=name), problem.truth())


@pytest.mark.parametrize(
    ("release", "op", "changes", "said"),
    [
        ("flashinfer", FlashInferMla(), {}, "upgrade to 0.7.4"),
        ("flashinfer_07", FlashInferMla(), {"dtype": torch.float16}, "bfloat16 queries only"),
        ("flashinfer_07", FlashInferMla(e4m3_reason=lambda device: "it is no Hopper"), {}, "no Hopper"),
    ],
)
def test_an_e4m3_cache_that_is_not_read_is_refused_with_the_reason(
    installed: Any, make_spec: Any, release: str, op: Any, changes: Any, said: str
) -> None:
    with installed(release):
        spec = make_spec(cache_format="fp8", token_bytes=576, **changes)
        assert any(said in reason for reason in op.unsupported_reasons(spec))


@pytest.mark.parametrize(
    ("op", "name", "said"),
    [
        (FlashMla(), "fp8", "takes e4m3 queries"),
        (TokenspeedMla(), "fp8:0.3", "takes e4m3 queries"),
        (IxformerMla(), "int8", "as two tensors"),
        (FlashMla(), "q8_0", "it claims none"),
        (FlashMlaSparse(), "fp8_ds_mla_any", "round decoded latents to bfloat16"),
        (FlashInferSparse(), "fp8_ds_mla", "round queries to e4m3"),
        (FlashInferSparse(), "fp8_ds_mla_any", "on sm_120 and sm_121"),
        (FlashInferSparse(), "fp8", "takes e4m3 queries"),
    ],
)
def test_formats_of_other_kernels_are_refused_by_name(make_spec: Any, op: Any, name: str, said: str) -> None:
    (reason,) = format_refusals(op, make_spec(cache_format=name))
    assert name in reason
    assert said in reason


def test_sparse_attention_of_an_older_release_is_refused(
    installed: Any, make_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed("flashinfer"):
        assert FlashInferSparse().unsupported_reasons(make_spec(topk=8)) == [
            "flashinfer.mla has no trtllm_batch_decode_with_kv_cache_mla"
        ]
    with installed("flashinfer_07"):
        assert FlashInferSparse().unsupported_reasons(make_spec(topk=8)) == []
        mla, name = importlib.import_module("flashinfer.mla"), "trtllm_batch_decode_with_kv_cache_mla"
        without_bases = inspect.signature(getattr(mla, name))
        kept = [it for it in without_bases.parameters.values() if it.name != "return_lse_base"]
        function = lambda **given: None  # noqa: E731
        function.__signature__ = without_bases.replace(parameters=kept)  # type: ignore[attr-defined]
        monkeypatch.setattr(mla, name, function)
        (reason,) = FlashInferSparse().unsupported_reasons(make_spec(topk=8))
        assert reason == f"flashinfer.mla.{name} takes no argument return_lse_base"
