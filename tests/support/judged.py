"""What the suite that judges backends says of one, check by check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mla.conformance.report import CheckResult
from mla.conformance.selection import Xfails
from mla.conformance.suite import carry_out, trials
from mla.conformance.trial import BackendUnderTest, Drawing, Trial
from mla_backends.api import Backend
from mla_backends.testing import HostBackend

# Which time a device, and the host has none.
TIMED = tuple(
    f"{group}.prepare" for group in ("latent", "expanded", "select_latents", "sparse_latent_attention")
)


def judged(
    backend: Backend,
    *only: str,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    wanted: Callable[[Trial], bool] = lambda trial: True,
    xfails: Xfails | None = None,
    **known: Any,
) -> list[CheckResult]:
    """Return the results of checks, as --quick has them. `known`: of `BackendUnderTest`."""
    subject = BackendUnderTest(backend, backend.name, **known)
    chosen = filter(wanted, trials(subject, dtypes, only))
    return [carry_out(trial, xfails or Xfails()) for trial in chosen]


def judged_op(
    op: Any, *only: str, dtypes: Sequence[torch.dtype] = (torch.bfloat16,), draws: int = 0
) -> list[CheckResult]:
    """Return the results of one op on the host, but for checks that time a device."""
    backend = HostBackend(ops={"op": op})
    wanted = lambda it: it.of in ("op", "") and it.check.id not in TIMED  # noqa: E731
    return judged(backend, *only, dtypes=dtypes, wanted=wanted, drawing=Drawing(draws))


def faults(results: Sequence[CheckResult]) -> list[tuple[str, str]]:
    """Return which checks neither passed nor were refused, and why."""
    return [(result.id, result.reason) for result in results if result.status not in ("pass", "refused")]
