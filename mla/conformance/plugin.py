"""The options `--mla-*` of pytest: `pytest --pyargs mla.conformance --mla-backend NAME`.

Every pytest beside `mla` loads this plugin, so it imports nothing but pytest before `--mla-backend` is given.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mla.conformance.suite import Suite

SUITE = "_mla_suite"  # an attribute of pytest's config: stashes are younger than some pytest beside us
PROPERTY = "mla"  # of a test's report, in JUnit's XML as well: the result of its check as JSON

_OPTIONS: dict[str, dict[str, Any]] = {
    "backend": {"metavar": "NAME", "help": "Backend to check, or package.module:attribute."},
    "device": {"metavar": "INDEX", "type": int, "help": "Index of the device."},
    "option": {"metavar": "KEY=VALUE", "action": "append", "default": [], "help": "Option of the backend."},
    "threads": {"metavar": "N", "type": int, "help": "Host threads. Default: the backend decides."},
    "dtype": {"action": "append", "default": [], "help": "Check only this dtype, such as bf16; repeatable."},
    "quick": {"action": "store_true", "help": "A first look: the same fixed checks, fewer draws."},
    "minutes": {"type": float, "metavar": "N", "help": "Duration in minutes. Default: 1 if quick, else 5."},
    "draws": {"type": int, "metavar": "N", "help": "Cases drawn per op and dtype, not --mla-minutes."},
    "seed": {"type": int, "default": 0, "metavar": "N", "help": "Seed of drawn cases."},
    "xfails": {"metavar": "FILE", "help": "Expected failures, one 'check: reason' per line."},
    "dump-failure": {"metavar": "DIR", "help": "Keep the first call of an op that is wrong in DIR."},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("mla", "conformance of a backend: --pyargs mla.conformance --mla-backend NAME")
    for name, attributes in _OPTIONS.items():
        group.addoption(f"--mla-{name}", **attributes)


def suite_of(config: pytest.Config) -> Suite:
    """Return what this pytest runs; the first call opens the backend. Raises `CollectError`."""
    if not hasattr(config, SUITE):
        if config.option.mla_dump_failure and hasattr(config, "workerinput"):
            raise pytest.Collector.CollectError(
                "--mla-dump-failure keeps one call: leave out -n, or use -n0."
            )
        setattr(config, SUITE, _opened(config.option))
    suite: Suite = getattr(config, SUITE)
    return suite


def pytest_collection_finish(session: pytest.Session) -> None:
    """Share the time for draws among the checks that were selected, by -k and the like."""
    suite: Suite | None = getattr(session.config, SUITE, None)
    if suite is not None:
        calls = (getattr(item, "callspec", None) for item in session.items)
        suite.selected = [call.params["instance"] for call in calls if call and "instance" in call.params]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many fixed cases did not run for lack of time: their checks have passed without them."""
    if config.option.mla_backend is None:
        return
    import msgspec

    from mla.conformance.card import left_for_time
    from mla.conformance.report import CheckResult

    reports = [report for ended in terminalreporter.stats.values() for report in ended]
    told = [dict(report.user_properties) for report in reports if getattr(report, "when", "") == "call"]
    results = [json.loads(properties[PROPERTY]) for properties in told if PROPERTY in properties]
    if left := left_for_time(msgspec.convert(results, list[CheckResult])):
        terminalreporter.write_line(f"{left} (--mla-minutes gives more)")


def pytest_configure(config: pytest.Config) -> None:
    """Have OpenMP's threads sleep, as the command does: cases are small, and there may be other workers."""
    if config.option.mla_backend:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _opened(options: Any) -> Suite:
    for name, right, least in (
        ("minutes", options.mla_minutes is None or 0 < options.mla_minutes < float("inf"), "above 0"),
        ("draws", options.mla_draws is None or options.mla_draws >= 0, "0 or more"),
        ("seed", options.mla_seed >= 0, "0 or more"),
    ):
        if not right:
            raise pytest.Collector.CollectError(f"--mla-{name} takes a number that is {least}.")
    if options.mla_backend is None:
        raise pytest.Collector.CollectError("--mla-backend is missing; `mla-bench list` shows what there is.")
    from mla.command.options import BackendOptions
    from mla.conformance.failures import Keeper
    from mla.conformance.selection import Xfails
    from mla.conformance.suite import Asked, Suite, require_hypothesis
    from mla.errors import MLAError
    from mla.text import named_dtype
    from mla_backends.errors import BackendError

    chosen = BackendOptions(
        options.mla_backend, options.mla_device, tuple(options.mla_option), options.mla_threads
    )
    how = (options.mla_minutes, options.mla_draws, options.mla_seed)
    try:
        if options.mla_draws != 0:
            require_hypothesis()
        dtypes = [named_dtype(word) for word in options.mla_dtype]
        asked = Asked(chosen, dtypes, (), options.mla_quick, *how)
        xfails = Xfails.read(Path(options.mla_xfails)) if options.mla_xfails else Xfails()
        suite = Suite.opened(asked, xfails)
        if options.mla_dump_failure:
            suite.keeper = Keeper.into(Path(options.mla_dump_failure), suite)
    except (MLAError, BackendError) as error:
        raise pytest.Collector.CollectError(str(error)) from error
    return suite
