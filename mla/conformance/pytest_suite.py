"""The suite as a pytest class: subclass it, and define the fixture `backend` and, if needed, `xfails`.

Example::

    import pytest
    from mla import load_backend
    from mla.conformance import BackendConformance

    @pytest.fixture(scope="module")
    def backend():
        return load_backend("acme")

    @pytest.fixture(scope="module")
    def xfails():  # or the path of an xfails file
        return {"latent.heads[mine-float16]": "SDK 4.3 pads heads to 16"}

    class TestAcme(BackendConformance):
        quick = False  # the full grid of shapes

Every check is one test, run for every op and dtype. What the backend refuses is skipped with its reasons; an
expected failure is an xfail; one that passes fails, so that the list stays true.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mla.conformance.registry import all_checks
from mla.conformance.report import CheckResult
from mla.conformance.report.card import failed_cases
from mla.conformance.speed import dtypes_of, slow_dtypes
from mla.conformance.suite import carry_out, claimed_dtypes, instances
from mla.conformance.trial import BackendUnderTest
from mla.conformance.xfails import Xfails, require_known
from mla_backends.api import Backend

_CHECKS = {check.id: check for check in all_checks()}


class BackendConformance:
    """Checks the backend that the fixture `backend` returns, set up as by `mla.load_backend`."""

    quick = True

    @pytest.fixture
    def expected_failures(self, request: pytest.FixtureRequest) -> Xfails:
        """Return what the fixture `xfails` lists; it may be absent."""
        try:
            listed = request.getfixturevalue("xfails")
        except pytest.FixtureLookupError:
            return Xfails()
        if not isinstance(listed, Mapping):
            return Xfails.read(Path(listed))
        for pattern in listed:
            require_known(pattern, "xfails")
        return Xfails(listed)

    @pytest.mark.parametrize("check_id", _CHECKS)
    def test_conformance(self, check_id: str, backend: Backend, expected_failures: Xfails) -> None:
        """The check passes for every op and dtype of the backend, or is refused with a reason."""
        subject = BackendUnderTest(backend, backend.name, self.quick, slow=_slow(backend))
        chosen = instances(subject, claimed_dtypes(subject), [check_id])
        found = [carry_out(one, subject, expected_failures) for one in chosen]
        conclude(_CHECKS[check_id].description, found)


_known: dict[tuple[type, str], frozenset[torch.dtype]] = {}


def _slow(backend: Backend) -> frozenset[torch.dtype]:
    """Return the dtypes that a backend is slow in, measured once: the fixture may make one per test."""
    key = (type(backend), str(backend.device))
    if key not in _known:
        claimed = claimed_dtypes(BackendUnderTest(backend, backend.name))
        _known[key] = dtypes_of(slow_dtypes(backend, claimed))
    return _known[key]


def conclude(description: str, found: list[CheckResult]) -> None:
    """Fail, xfail, skip or return, by the worst result."""
    by_status: dict[str, list[CheckResult]] = {}
    for one in found:
        by_status.setdefault(one.status, []).append(one)
    if "fail" in by_status:
        pytest.fail("\n".join([description, *map(_failed, by_status["fail"])]), pytrace=False)
    if "xpass" in by_status:
        pytest.fail(f"expected to fail, but passed:\n{_lines(by_status['xpass'])}", pytrace=False)
    if "xfail" in by_status:
        pytest.xfail(_lines(by_status["xfail"]))
    if "pass" not in by_status:
        pytest.skip(_lines(by_status.get("refused", [])))


def _failed(one: CheckResult) -> str:
    """Return a failed check with its wrong cases, each by the id that `--only` of the command line takes."""
    return "\n  ".join([f"{one.id}: {one.cases.failed} wrong", *failed_cases(one)])


def _lines(results: list[Any]) -> str:
    return "\n".join(f"{one.id}: {one.reason}" for one in results)
