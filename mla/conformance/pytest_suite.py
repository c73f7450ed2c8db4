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
        return {"latent.tiles[mine-float16]": "SDK 4.3 drops a last tile"}

    class TestAcme(BackendConformance):
        quick = False  # the reference as well, where an op serves in its place
        draws = 300  # cases drawn for every op and dtype; 0: none

Every check is one test, run for every op and dtype. Few draws pass if all are right: this class is for every
change, and only the card of `python -m mla.conformance` calls them incomplete. What the backend refuses is
skipped with its reasons; an expected failure is an xfail; one that passes fails, so that the list stays true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mla.conformance.card import failed_cases
from mla.conformance.registry import DRAWN, all_checks
from mla.conformance.report import CheckResult, Status
from mla.conformance.selection import Xfails, require_known
from mla.conformance.suite import carry_out, claimed_dtypes, require_hypothesis, trials
from mla.conformance.trial import BackendUnderTest, Drawing
from mla.errors import UsageError
from mla_backends.api import Backend

_CHECKS = {check.id: check for check in all_checks()}


class BackendConformance:
    """Checks the backend that the fixture `backend` returns, set up as by `mla.load_backend`."""

    quick = True
    draws = 25  # cases drawn for every op and dtype, the same in every run; 0: none

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
        if self.draws and _CHECKS[check_id].fails == DRAWN:
            try:
                require_hypothesis()
            except UsageError as error:
                pytest.fail(str(error), pytrace=False)
        subject = BackendUnderTest(backend, backend.name, drawing=Drawing(self.draws))
        only = [check_id, *[f"{check_id}[reference-*"] * (not self.quick)]
        chosen = trials(subject, claimed_dtypes(subject), only)
        results = [carry_out(trial, expected_failures) for trial in chosen]
        conclude(_CHECKS[check_id].description, results)


def conclude(description: str, results: Sequence[CheckResult]) -> None:
    """Fail, xfail, skip or return, by the worst result; few draws that are right will do."""

    def reasons(status: Status) -> str:
        return "\n".join(f"{result.id}: {result.reason}" for result in results if result.status == status)

    # Each wrong case by the id that `--only` of the command line takes.
    failed = [
        "\n  ".join([f"{result.id}: {result.cases.failed} wrong", *failed_cases(result)])
        for result in results
        if result.status == "fail"
    ]
    if failed:
        pytest.fail("\n".join([description, *failed]), pytrace=False)
    if unexpected := reasons("xpass"):
        pytest.fail(f"expected to fail, but passed:\n{unexpected}", pytrace=False)
    if expected := reasons("xfail"):
        pytest.xfail(expected)
        pytest.fail(expected, pytrace=False)  # --runxfail has pytest.xfail return
    if not any(result.status in ("pass", "incomplete") for result in results):
        pytest.skip(reasons("refused"))
