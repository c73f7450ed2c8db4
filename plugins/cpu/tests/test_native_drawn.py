"""Drawn cases of the compiled kernels, at the best level that this processor has."""

from __future__ import annotations

import pytest
import torch

import mla
from mla.conformance.selection import Xfails
from mla.conformance.suite import carry_out, instances
from mla.conformance.trial import BackendUnderTest, Drawing

DRAWS = 15
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = (
    "linear", "batched_linear", "rms_norm", "rotate_query", "write_latent", "latent", "expanded",
    "write_index_key", "select_latents", "sparse_latent_attention",
)  # fmt: skip


@pytest.fixture(scope="module")
def subject() -> BackendUnderTest:
    """Return the backend as it is without options."""
    return BackendUnderTest(mla.load_backend("cpu", threads=1), "cpu", True, drawing=Drawing(DRAWS, seed=7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_drawn_case_is_wrong(subject: BackendUnderTest, kind: str, dtype: torch.dtype) -> None:
    chosen = instances(subject, (dtype,), [f"{kind}.drawn"])
    results = [carry_out(choice, subject, Xfails()) for choice in chosen]
    assert [result.reason for result in results if result.status == "fail"] == []
    assert any(result.drawn and result.drawn.judged == DRAWS for result in results)
