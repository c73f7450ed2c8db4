"""The layer takes a log-sum-exp where it reads one, and from every op that cannot do without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla.layer.plan import rebuilt_bytes
from mla.reference import REFERENCE

Latent, Expanded = (type(REFERENCE[kind]) for kind in ("latent_attention", "expanded_attention"))


class Noting:
    """Notes whether it was given an lse."""

    def __init__(self, optional: bool) -> None:
        self.lse_optional, self.given = optional, []

    def __call__(self, *args: Any, **tensors: Any) -> None:
        self.given.append(tensors["lse"] is not None)
        super().__call__(*args, **tensors)  # type: ignore[misc]


class NotingLatent(Noting, Latent):  # type: ignore[misc, valid-type]
    pass


class NotingExpanded(Noting, Expanded):  # type: ignore[misc, valid-type]
    pass


@pytest.mark.parametrize("optional", [True, False])
def test_on_the_absorbed_path_nobody_reads_it(make_case: Any, assert_rows_close: Any, optional: bool) -> None:
    op = NotingLatent(optional)
    case = make_case([1, 3, 1], [9, 40, 0], attention="absorbed", ops={"noting": op})
    assert_rows_close(case.run(), case.truth(), 1e-5)
    assert op.given == [not optional]
    assert ("lse" in case.layer._scratch._held) == (not optional)


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
def test_on_the_expanded_path_merging_reads_it(
    make_case: Any, assert_rows_close: Any, optional: bool, rounds: int
) -> None:
    op = NotingExpanded(optional)
    case = make_case([20, 60], [9, 0], attention="expanded", ops={"noting": op})
    case.layer.workspace_bytes = rebuilt_bytes(case.config, 4, 89 if rounds == 1 else 60)
    assert_rows_close(case.run(), case.truth(), 1e-5)
    assert len(case.layer.plan(case.batch).expanded.rounds) == rounds
    assert op.given == [not optional] if rounds == 1 else all(op.given)


def test_the_reference_gives_the_same_bits_without(latent_problem: Any) -> None:
    problem = latent_problem([3, 1, 9, 1], [40, 7, 30, 0])
    expected, op = problem.run(Latent())[0], Latent()
    out = torch.full_like(expected, torch.nan)
    op(
        op.prepare(problem.spec, problem.view), q=problem.q, cache=problem.cache, out=out, lse=None,
        block_table=problem.view.block_table, kv_lens=problem.view.kv_lens_device,
        cu_q=problem.view.cu_q, softmax_scale=problem.spec.softmax_scale,
    )  # fmt: skip
    assert torch.equal(out, expected)
