"""A run of pytest over the checks of a suite, the report that is made of its reports, and the exit code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from mla.command import environment
from mla.command.console import note
from mla.command.display import Progress
from mla.command.exit_codes import Exit
from mla.command.exit_codes import interrupted as ended_early
from mla.conformance import plugin, test_backend
from mla.conformance.card import Extent, blind
from mla.conformance.plugin import PROPERTY, SUITE
from mla.conformance.report import SCHEMA_VERSION, CheckedBackend, CheckResult, ConformanceReport
from mla.conformance.suite import Suite, claimed_dtypes
from mla.conformance.trial import ask
from mla.text import dtype_name

# Nothing of the user's pytest: no configuration, no conftest.py, no cache, no other plugin. What a backend
# prints, logs or warns of goes where it went without pytest.
PYTEST = (
    *("-c", os.devnull, f"--rootdir={Path(__file__).parent}", "--noconftest", "--import-mode=importlib"),
    *("--assert=plain", "--capture=no", "--tb=no", "-pno:terminalreporter", "-pno:cacheprovider"),
    *("-pno:faulthandler", "-pno:logging", "-pno:warnings"),
    *("-pno:unraisableexception", "-pno:threadexception"),
)
ENVIRONMENT = {"PYTEST_ADDOPTS": "", "PYTEST_PLUGINS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
SLOWEST = 10  # checks that --verbose names at the end


class Results:
    """A plugin of one pytest that collects what its tests recorded."""

    def __init__(self, suite: Suite, verbose: bool = False) -> None:
        self.suite, self.verbose = suite, verbose
        self.by_id: dict[str, CheckResult] = {}
        self.progress = Progress(len(suite.planned))
        self.error: BaseException | None = None  # of our own making: what a backend raises is a result

    def pytest_configure(self, config: pytest.Config) -> None:
        """Let the tests find the suite, which is open already."""
        setattr(config, SUITE, self.suite)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Iterator[None]:
        """Show how far it is."""
        with self.progress:
            return (yield)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Name what runs now, in case it ends the process."""
        self.progress.advance(id_of(item), 0)
        if self.verbose:
            note(id_of(item))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the result of a check."""
        if report.when == "call" and (recorded := dict(report.user_properties).get(PROPERTY)):
            result = msgspec.convert(json.loads(str(recorded)), CheckResult)
            self.by_id[result.id] = result
            self.progress.advance(result.id, 1)

    def pytest_exception_interact(self, call: pytest.CallInfo[None]) -> None:
        """Keep what was raised outside of a check."""
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.fail.Exception):
            self.error = self.error or call.excinfo.value

    def pytest_sessionfinish(self) -> None:
        """Name the checks that took longest."""
        if self.verbose:
            longest = sorted(self.by_id.values(), key=lambda result: -result.seconds)[:SLOWEST]
            note(f"slowest: {', '.join(f'{result.id} {result.seconds:.1f} s' for result in longest)}")


def id_of(item: pytest.Item) -> str:
    """Return the id of the check that a test was parametrised by."""
    return item.callspec.params["instance"].id  # type: ignore[attr-defined]  # of functions with parameters


def carry_out(suite: Suite, words: Sequence[str], verbose: bool) -> ConformanceReport:
    """Have pytest run a suite, and nothing of what pytest is told elsewhere. `words`: the command line."""
    results = Results(suite, verbose)
    before = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    os.environ.update(ENVIRONMENT)
    try:
        code = pytest.main([*PYTEST, test_backend.__file__], [plugin, results])
    finally:
        for name in ENVIRONMENT:
            del os.environ[name]
        os.environ.update(before)
    if results.error is not None:
        raise results.error
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        raise RuntimeError(f"pytest ended with {code!r}")
    return make_report(words, results, code == pytest.ExitCode.INTERRUPTED)


def make_report(words: Sequence[str], collected: Results, interrupted: bool) -> ConformanceReport:
    """Put the results together with what they depend on; `words` are those of the command line."""
    suite = collected.suite
    subject, asked = suite.subject, suite.asked
    results = [collected.by_id[instance.id] for instance in suite.planned if instance.id in collected.by_id]
    dtypes, claimed = (list(map(dtype_name, each)) for each in (suite.dtypes, claimed_dtypes(subject)))
    extent = Extent(subject.quick, asked.only, claimed, dtypes, len(suite.planned))
    return ConformanceReport(
        schema_version=SCHEMA_VERSION,
        argv=["python", "-m", "mla.conformance", *words],
        alone=asked.alone(),
        created=environment.now(),
        git_commit=environment.git_commit(),
        interrupted=interrupted,
        quick=subject.quick,
        backend=CheckedBackend(
            name=subject.name,
            version=subject.version,
            device=str(subject.backend.device),
            device_name=ask(lambda: str(subject.backend.device_info().name), "unknown"),
        ),
        environment=ask(lambda: environment.environment(subject.backend), {"environment": "unknown"}),
        dtypes=dtypes,
        planned=len(suite.planned),
        checks=results,
        unused_xfails=suite.xfails.unused(),
        blind=blind(extent, results),
    )


def verdict(report: ConformanceReport) -> Exit:
    """Return the exit code."""
    counts = report.counts()
    if report.interrupted:
        return ended_early()
    if counts["fail"]:
        return Exit.WRONG
    if counts["xpass"]:
        return Exit.REGRESSION
    if counts["incomplete"] and not report.quick:  # a first look is not meant to be complete
        return Exit.INCOMPLETE
    return Exit.OK if counts["pass"] + counts["xfail"] + counts["incomplete"] else Exit.NOTHING_RAN
