"""The kinds of sparse attention: pages of bytes, and what is drawn."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_bench import OpBench
from wrong_sparse import MUTANTS

from mla import MLAConfig
from mla.cases.case import OpCase
from mla.cases.memory import Layout
from mla.cases.played import Laid, Scene
from mla.cases.sparse import SELECTIONS, selected_keys, selection_of
from mla.cases.stress import Stress
from mla.reference import REFERENCE
from mla_backends.api import AttentionSpec, IndexerSpec

CPU = torch.device("cpu")
CONFIG = MLAConfig(
    64, 2, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    index_topk=6, index_n_heads=3, index_head_dim=16,
)  # fmt: skip
KINDS = ("write_index_key", "select_latents")


def spec_of(kind: str, index_format: str = "", topk: int = 6) -> Any:
    if kind == "sparse_latent_attention":
        return AttentionSpec(2, 32, 16, 8, 12, 0.2, torch.float32, CPU, topk=topk)
    spec = IndexerSpec(3, 16, 8, topk, torch.float32, CPU)
    return replace(spec, index_format=index_format, token_bytes=20) if index_format else spec


def case_of(kind: str, index_format: str = "", **fields: Any) -> OpCase:
    layout = Layout(4, spare=2, shuffle=3, unowned=torch.nan)
    case = OpCase(kind, spec_of(kind, index_format), (2, 3, 1), (14, 3, 9), stress=Stress(), layout=layout)
    return case.but(**fields)


def test_one_query_selects_others_from_call_to_call() -> None:
    """An op that gives its last answer again is found by the next call."""
    bench = OpBench(CONFIG, "select_latents", torch.float32, ((40, 1),), runs=8)
    implementation, seen = bench.implementation(REFERENCE["select_latents"]), list[torch.Tensor]()
    bench.run(implementation, 1)
    seen = [out.sort(dim=1).values for out in implementation.outputs().values()]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_bytes_is_written_and_read_as_its_format_splits_it(kind: str) -> None:
    case = case_of(kind, "fp8")
    assert Laid(case, REFERENCE[kind]).call() == ""
    assert "fp8" in case.label
    wrong = MUTANTS["write_index_key.pages"] if kind == KINDS[0] else MUTANTS["select_latents.fp8"][2:]
    assert all(Laid(case, make()).call() for make in wrong)


def test_a_stray_byte_beside_a_page_s_tokens_is_named() -> None:
    class Stray(type(REFERENCE["write_index_key"])):  # type: ignore[misc]
        def __call__(self, **given: Any) -> None:
            super().__call__(**given)
            free = set(range(given["cache"].shape[0] * 4)) - set(given["slots"].tolist())
            page, slot = divmod(min(free), 4)
            given["cache"].view(len(given["cache"]), -1)[page, 4 * 16 + 4 * slot] = 3  # its scale

    reason = Laid(case_of("write_index_key", "fp8"), Stray(("fp8",))).call()
    assert reason.startswith("1 slots other than those of the new tokens have changed")


@pytest.mark.parametrize("how", SELECTIONS)
def test_drawn_selections_are_causal_distinct_and_complete(how: str) -> None:
    case = case_of("sparse_latent_attention", selection=how)
    for row, (_, seen) in zip(selection_of(case).tolist(), case.spans, strict=True):
        count = min(6, seen)
        assert row[count:] == [-1] * (6 - count)
        assert len({*row[:count]}) == count
        assert all(0 <= position < seen for position in row[:count])
    first = selection_of(case)[0].sort().values.tolist()
    assert (first == [7, 8, 9, 10, 11, 12]) == (how in ("recent", "clustered"))  # of one block, the last
    assert (first == [0, 1, 2, 3, 4, 5]) == (how == "tied")


@pytest.mark.parametrize("how", SELECTIONS)
def test_true_scores_lie_as_the_selection_says(how: str) -> None:
    case = OpCase(
        "select_latents", spec_of("select_latents", topk=32), (1,), (600,), stress=Stress(), selection=how
    )
    call = Laid(case, REFERENCE["select_latents"])
    assert call.call() == ""
    chosen = call.results()["out"][0].sort().values.tolist()
    assert (chosen[0] >= 500) == (how == "recent")
    assert (len({place // 64 for place in chosen}) <= 3) == (how in ("recent", "clustered"))
    reach = call.pool.truth["reach"][0]
    assert (len(reach.unique()) <= 16) == (how == "tied")


def test_different_selected_tokens_are_counted_once() -> None:
    case = case_of("sparse_latent_attention", selection="recent")
    chosen = selected_keys(selection_of(case), case.spans)
    unique = {int(key) for key in chosen.flatten() if key >= 0}
    moved = case.but(selection="random").work.bytes - case.work.bytes
    assert len(unique) == 7 + 3 + 6
    assert moved % (40 * 4) == 0
    assert case.work.flops == 2 * 2 * (6 + 6 + 1 + 2 + 3 + 6) * (2 * 32 + 8)


def test_an_op_may_not_write_to_its_selection() -> None:
    class Sorts(type(REFERENCE["sparse_latent_attention"])):  # type: ignore[misc]
        def __call__(self, state: Any, **given: Any) -> None:
            super().__call__(state, **given)
            given["selection"].copy_(given["selection"].sort(dim=1).values)

    case = case_of("sparse_latent_attention")
    assert "the op wrote to selection" in Laid(case, Sorts()).call()
    assert Laid(case, REFERENCE[case.kind], Scene((case,), lse=False)).call() == ""
