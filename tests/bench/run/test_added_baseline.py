"""A baseline that nobody asked for costs a run neither its numbers nor its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mla.bench import results
from mla.bench.plan import resolve
from mla.bench.plan.options import RunOptions
from mla.bench.results.cases import ADDED
from mla.bench.run.scenario_run import withhold

Bench = Callable[..., Any]
MODULE = """
from mla.bench.subjects.layer import MlaLayer

class Right(MlaLayer):
    def __init__(self, setting, state):
        super().__init__(setting, state, "added", "reference")

class Raising(Right):
    def step(self, index):
        raise RuntimeError("no kernel for this device")

class Wrong(Right):
    def step(self, index):
        super().step(index)
        self.out.mul_(1.1)
"""
QUICK = ("--runs", "3", "--scenario", "decode")


@pytest.fixture
def first_look(bench: Bench, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return a function that makes a tiny run a first look, which a class of `MODULE` joins."""
    (tmp_path / "joins.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(RunOptions, "is_first_look", True)

    def first_look(name: str, *words: str) -> Any:
        if name:
            added = resolve._added_baselines

            def joining(config: Any, resumed: Any) -> list[str]:
                return [f"joins:{name}"] if resumed is None else added(config, resumed)

            monkeypatch.setattr(resolve, "_added_baselines", joining)
        return bench("--backend", "cpu", *small, *QUICK, *words)

    return first_look


def stored(name: str) -> dict[str, results.Case]:
    return {case.implementation: case for case in results.read(Path(name)).cases}


def test_what_it_raises_costs_its_own_row_alone(first_look: Bench) -> None:
    done = first_look("Raising", "-o", "run.json")
    assert done.code == 0, done.err
    assert "decode, joins:Raising is skipped: no kernel for this device" in done.err
    cases = stored("run.json")
    assert cases["mla"].latency_ms is not None
    assert cases["joins:Raising"].check == results.Check(status="not run", reason="no kernel for this device")


def test_an_implementation_that_was_asked_for_ends_the_run(first_look: Bench) -> None:
    done = first_look("Right", "--implementations", "mla,joins:Raising")
    assert done.code == 3, done.err


def test_its_wrong_result_is_shown_and_no_exit_code(first_look: Bench) -> None:
    done = first_look("Wrong")
    assert done.code == 0, done.err
    assert "joins:Wrong" in done.out
    assert "WRONG" in done.out


def test_no_gate_depends_on_it(first_look: Bench, bench: Bench) -> None:
    assert first_look("Right", "-o", "with.json").code == 0
    run = results.read(Path("with.json"))
    assert run.environment[ADDED] == "joins:Right"
    asked = results.decode(results.encode(run))
    del asked.environment[ADDED]
    results.write(asked, Path("asked.json"))
    added = next(case for case in run.cases if case.implementation == "joins:Right")
    withhold(added, "is in doubt")
    results.write(run, Path("doubtful.json"))
    run.cases.remove(added)
    results.write(run, Path("without.json"))
    gate = ("--fail-slower", "900%")
    for other in ("doubtful.json", "without.json"):
        done = bench("compare", "with.json", other, *gate)
        assert (done.code, done.err) == (0, "")
    done = bench("compare", "asked.json", "without.json", *gate)
    assert done.code == 1
    assert done.error == "not compared: decode, joins:Right: missing from the new run"


@pytest.mark.parametrize(
    ("words", "is_first_look"),
    [
        ((), True),
        (("--config", "deepseek-v2-lite"), True),
        (("--config", "deepseek-r1"), False),
        (("--implementations", "mla"), False),
        (("--scenario", "decode"), False),
    ],
)
def test_the_default_config_may_be_spelled_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], is_first_look: bool
) -> None:
    looks = []

    def noted(config: Any, resumed: Any) -> list[str]:
        looks.append(config)
        return []

    monkeypatch.setattr(resolve, "_added_baselines", noted)
    assert bench("--backend", "cpu", "--list-ops", *words).code == 0
    assert bool(looks) == is_first_look


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("5.10.0", "this needs transformers 5.20 or later, and 5.10.0 is installed"),
        (None, "operator torchvision::nms does not exist"),
    ],
)
def test_transformers_that_does_not_work_is_skipped(
    first_look: Bench, monkeypatch: pytest.MonkeyPatch, version: str | None, said: str
) -> None:
    module = ModuleType("transformers")
    module.__spec__ = ModuleSpec("transformers", None)
    utils = ModuleType("transformers.utils.import_utils")
    utils.is_torch_available = lambda: True  # type: ignore[attr-defined]
    if version is None:

        def broken(name: str) -> Any:
            raise RuntimeError("operator torchvision::nms does not exist")

        module.__getattr__ = broken  # type: ignore[method-assign]
    else:
        module.__version__ = version  # type: ignore[attr-defined]
        module.DynamicCache = object  # type: ignore[attr-defined]
    for fake in (module, ModuleType("transformers.utils"), utils):
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    done = first_look("", "--list-ops")
    assert done.code == 0, done.err
    assert f"transformers is skipped: implementation 'transformers': {said}" in done.err
