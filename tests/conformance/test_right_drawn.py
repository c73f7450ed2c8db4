"""Ops that are right in other forms: neither a border nor a drawn case calls one wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flash import Flash, Normalised
from right_ops import RIGHT_OPS
from wrong_ops import formats

from mla.conformance.report import CheckResult
from mla.conformance.trial import Drawing
from mla_backends import FusedOp

Run = Callable[..., list[CheckResult]]
DRAWS, OF_FORMATS = 60, 15
FORMS: dict[str, Callable[[], FusedOp]] = {op.__name__: op for op in RIGHT_OPS} | {
    f"{form.__name__}-{kind}-{splits}": functools.partial(form, f"{kind}_attention/1", 64, splits)
    for kind in ("latent", "expanded")
    for form, splits in ((Flash, 1), (Flash, 3), (Normalised, 1))
}
EVERY = {**FORMS, **{f"over a format {number}": form for number, form in enumerate(formats.RIGHT)}}


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_drawn_case_is_called_wrong(judge: Run, sound: Any, form: str, dtype: torch.dtype) -> None:
    count, backend = DRAWS if form in FORMS else OF_FORMATS, sound(ops={"mine": EVERY[form]()})
    (result,) = judge(backend, "*.drawn[mine-*]", dtypes=(dtype,), drawing=Drawing(count, seed=1))
    assert (result.status, result.failures) == ("incomplete", [])
    assert result.drawn is not None
    assert result.drawn.judged == count
    assert form in FORMS or result.drawn.along["cache"] != f"plain {count}"


@pytest.mark.usefixtures("smaller")
@pytest.mark.parametrize("kind", ["latent", "expanded"])
@pytest.mark.parametrize("splits", [1, 3])
def test_no_border_is_called_wrong(judge: Run, sound: Any, kind: str, splits: int) -> None:
    """Where rounding counts most: aimed queries, long contexts, parts that are merged."""
    op = Flash(f"{kind}_attention/1", 64 * splits, splits)
    borders = [f"{kind}.{check}[mine-*]" for check in ("formula", "grid", "tiles", "alive")]
    results = judge(sound(ops={"mine": op}), *borders, dtypes=(torch.bfloat16, torch.float32))
    assert len(results) >= 8
    assert [(result.id, result.reason) for result in results if result.status != "pass"] == []


def test_keys_that_are_subnormal_in_the_dtype_before_they_are_encoded_are_no_alarm(
    judge: Run, sound: Any
) -> None:
    """Rows a thousandth of others lose relative accuracy in float16, which a wider format would keep."""
    drawing = Drawing(20, seed=0)
    (result,) = judge(sound(), "write_latent.drawn[reference-*]", dtypes=(torch.float16,), drawing=drawing)
    assert (result.status, result.failures) == ("incomplete", [])


@pytest.mark.parametrize(
    ("form", "dtype", "seed"),
    [
        # A sum of 13737 numbers in float32, in another order than the reference's, errs beyond the bound.
        ("TransposedLinear", torch.float32, 5003),
        # Many equal keys, and zeros at steep logits.
        ("LoopLatent", torch.float32, 20012),
        ("Flash-expanded-1", torch.float16, 20012),
        ("Flash-expanded-1", torch.float16, 60000),
        ("Flash-latent-1", torch.float16, 70019),
        ("DenseLatent", torch.float32, 80003),
        ("Normalised-latent-1", torch.bfloat16, 1),
        ("Normalised-latent-1", torch.bfloat16, 6000),
    ],
    ids=str,
)
def test_sums_that_nearly_cancel_are_no_alarm(
    judge: Run, sound: Any, form: str, dtype: torch.dtype, seed: int
) -> None:
    backend, drawing = sound(ops={"mine": FORMS[form]()}), Drawing(DRAWS + 4, seed=seed)
    (result,) = judge(backend, "*.drawn[mine-*]", dtypes=(dtype,), drawing=drawing)
    assert (result.status, result.failures) == ("incomplete", [])
