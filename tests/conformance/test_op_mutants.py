"""Deliberately wrong ops: each check has some.

That each is found by its check is in `tests/frozen/test_wrong.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import wrong_sparse
from wrong_attention import ALL
from wrong_attention.base import FAR, Latent
from wrong_in_play import FIXED
from wrong_ops.base import FORMULAS, SMALL_OPS
from wrong_ops.by_kind import KINDS
from wrong_ops.formulas import MUTANTS

from mla.conformance import reach
from mla.conformance.registry import all_checks
from mla.conformance.report import CheckResult

Run = Callable[..., list[CheckResult]]


def test_every_check_of_attention_has_a_mutant() -> None:
    kinds = ("latent_attention", "expanded_attention")
    fixed = {check.id for check in all_checks() if check.kind in kinds and check.fails != "drawn"}
    assert ALL.keys() & FIXED == fixed


def test_every_check_of_sparse_attention_has_a_mutant() -> None:
    kinds = ("write_index_key", "select_latents", "sparse_latent_attention")
    fixed = {check.id for check in all_checks() if check.kind in kinds and check.fails != "drawn"}
    assert wrong_sparse.MUTANTS.keys() & FIXED == fixed


def test_every_check_of_small_ops_has_mutants_of_its_kind() -> None:
    """One for what is computed; two for how kernels fail."""
    assert MUTANTS.keys() & FIXED == FORMULAS
    fixed = [check for check in all_checks() if check.fails != "drawn"]  # which has wrong ops of its own
    checks = {check.id: check.fails for check in fixed if check.kind in SMALL_OPS}
    kinds = [(check, kind) for kind, ops in KINDS.items() for check, _, _ in ops if check in checks]
    assert [(check, kind) for check, kind in kinds if checks[check] != kind] == []
    counts = Counter(check for check, _ in kinds)
    assert set(counts) == checks.keys() - FORMULAS
    assert min(counts.values()) > 1


def test_a_cache_that_there_is_no_memory_for_is_refused(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(available: int | None) -> CheckResult:
        monkeypatch.setattr(reach.host, "memory_available", lambda: available)
        (result,) = judge(sound(ops={"mine": Latent()}), "latent.far_pages[mine-*]")
        return result

    monkeypatch.setattr(reach, "PLACES", (2 * FAR, FAR))
    assert judged(16 * FAR).note == "0.034 GB from the start"
    assert judged(8 * FAR).note == "0.017 GB from the start"  # and a copy in float32, if an op makes one
    assert (judged(8 * FAR - 1).status, judged(8 * FAR - 1).reason) == (
        "refused",
        "there is no room for 0.017 GB",
    )
    assert judged(None).reason == "how much memory is free is not known"


def test_the_reference_finds_pages_as_far_as_this_machine_goes(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the pages of the requests is touched, so that this takes address space and no memory."""
    monkeypatch.setattr(reach, "PLACES", (1 << 32, 1 << 31, 1 << 30))
    (result,) = judge(sound(), "latent.far_pages[reference-bfloat16]", dtypes=(torch.bfloat16,))
    assert result.status in ("pass", "refused"), result.reason
