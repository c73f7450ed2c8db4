"""`--implementations package.module:Class`: a class from anywhere is timed and checked like ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.limits.roofline import RooflineModel
from mla.bench.run import scenario_run
from mla.bench.subjects import transformers_layer

Bench = Callable[..., Any]

MODULE = """
import torch
from mla.bench.subjects.base import Facts, Implementation
from mla.verify.layer_oracle import oracle
from mla.verify.verdict import Check

class Plain:
    off = 1.0

    def __init__(self, setting, state):
        self.config, self.state = setting.config, state

    def load(self, scenario, inputs):
        self.scenario, self.inputs = scenario, inputs

    def restore(self, number=0):
        self.number, self.kept, self.rows = number, {}, []

    def before(self, index):
        self.hidden, self.history = self.inputs.forward(self.number, index)

    def step(self, index):
        lens = self.scenario.query_lens
        if self.scenario.mode == "prefill":
            outputs = oracle(self.config, self.state, self.hidden, lens, self.history)
        else:  # all tokens of the pass so far, request by request
            self.rows.append(self.hidden)
            steps = len(self.rows)
            every = torch.cat([torch.stack(rows) for rows in zip(*(step.unbind() for step in self.rows))])
            outputs = oracle(self.config, self.state, every, [steps] * len(lens), self.history)
            outputs = outputs[steps - 1 :: steps]
        self.out = (self.off * outputs).to(self.hidden.dtype)

    def after(self, index):
        self.kept[index] = self.out

    def outputs(self):
        return self.kept

    def facts(self):
        weights = sum(weight.nbytes for weight in self.state.values())
        return Facts(weight_bytes=weights, ops={"layer": "plain"})

class Wrong(Plain):
    off = 1.1

class Nothing(Plain):
    outputs = lambda self: {}

class Few(Plain):
    outputs = lambda self: dict(list(self.kept.items())[1:])

class Strange(Plain):
    outputs = lambda self: {**self.kept, 99: self.out}

class OneRow(Plain):
    outputs = lambda self: {index: rows[:1] for index, rows in self.kept.items()}

class Arrays(Plain):
    outputs = lambda self: {index: rows.float().numpy() for index, rows in self.kept.items()}

class Listed(Plain):
    outputs = lambda self: list(self.kept.values())

class Plainly(Plain):
    facts = lambda self: {"weight_bytes": 0}

class Bare(Plain):
    __init__ = lambda self: None

class Numberless(Plain):
    restore = lambda self: None

class Half:
    load = restore = step = lambda self, *given: None

class Baseline(Implementation):
    __init__ = lambda self, setting, state: super(Baseline, self).__init__(setting)
    computes = False
    load = before = step = after = lambda self, *given: None
    restore = lambda self, number=0: None
    outputs = lambda self: {}
    check = lambda self, checker: Check(status="ok")
    facts = lambda self: Facts()

class Remembers(Plain):
    known = {}

    def step(self, index):
        key = self.hidden.abs().sum().item()
        if key in self.known:
            self.out = self.known[key]
        else:
            super().step(index)
            self.known[key] = self.out
"""


@pytest.fixture
def measure(bench: Bench, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return a function that times implementations by name, in both scenarios."""
    (tmp_path / "elsewhere.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def measure(names: str, *words: str) -> Any:
        chosen = ["--implementations", names, "-o", "run.json", "--passes", "2", "--runs", "3"]
        return bench("--backend", "cpu", *small, *chosen, *words)

    return measure


def cases() -> dict[tuple[str, str], results.Case]:
    run = results.decode(Path("run.json").read_bytes())
    return {(case.scenario, case.implementation): case for case in run.cases}


def test_it_is_timed_checked_and_compared(measure: Bench) -> None:
    done = measure("mla,elsewhere:Plain")
    assert done.code == 0, done.err
    for scenario in ("prefill", "decode"):
        case = cases()[scenario, "elsewhere:Plain"]
        assert (case.check.status, case.passes) == ("ok", 2), case.check
        assert case.ops == {"layer": "plain"}
        assert case.memory.weight_bytes > 0
        assert [agreement.implementation for agreement in case.agreement] == ["mla"]
        assert "elsewhere:Plain" in case.repro


def test_a_baseline_that_computes_nothing_has_no_limit(
    measure: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RooflineModel, "implausible", lambda *work: "it cannot be")
    monkeypatch.setattr(scenario_run, "PAUSES_S", ())
    measure("mla,elsewhere:Baseline", "--scenario", "prefill")
    assert [case.check.status for case in cases().values()] == ["doubtful", "ok"]


@pytest.mark.parametrize("name", ["Wrong", "Remembers"])
def test_a_wrong_one_has_no_number(measure: Bench, name: str) -> None:
    done = measure(f"elsewhere:{name}", "--scenario", "decode")
    assert done.code == 4, done.err
    assert cases()["decode", f"elsewhere:{name}"].latency_ms is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Nothing", "is not a dict of the 3 forwards of the pass"),
        ("Few", "is not a dict of the 3 forwards of the pass"),
        ("Strange", "is not a dict of the 3 forwards of the pass"),
        ("OneRow", "has no tensor ["),
        ("Arrays", "has no tensor ["),
        ("Listed", "is not a dict of the 3 forwards of the pass"),
    ],
)
def test_every_output_of_a_pass_is_due(measure: Bench, name: str, said: str) -> None:
    done = measure(f"elsewhere:{name}", "--scenario", "decode")
    assert done.code == 4, done.err
    case = cases()["decode", f"elsewhere:{name}"]
    assert case.latency_ms is None
    assert case.check.reason.startswith(f"outputs() of 'elsewhere:{name}' ")
    assert said in case.check.reason


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Plainly", "facts() of 'elsewhere:Plainly' returns 'dict', not `mla.bench."),
        ("Bare", "'elsewhere:Bare' cannot be called as here: "),
        ("Numberless", "'elsewhere:Numberless' cannot be called as here: "),
    ],
)
def test_a_class_that_is_called_otherwise_is_a_mistake_of_its_author(
    measure: Bench, name: str, said: str
) -> None:
    done = measure(f"elsewhere:{name}", "--scenario", "decode")
    assert done.code == 2, done.err
    assert f"error: --implementations: {said}" in done.err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "nowhere:Plain",
            "'nowhere:Plain' cannot be imported: ModuleNotFoundError: No module named 'nowhere'.",
        ),
        ("elsewhere:Missing", "'elsewhere:Missing' cannot be imported: AttributeError: "),
        (
            "elsewhere:Half",
            "'elsewhere:Half' lacks before, after, outputs, facts (an implementation has 7 methods",
        ),
    ],
)
def test_what_is_none_is_said_in_one_sentence(measure: Bench, name: str, said: str) -> None:
    done = measure(name)
    assert done.code == 2
    assert f"--implementations: {said}" in done.err
    assert done.err.count("error: ") == 1


@pytest.mark.parametrize(
    ("names", "code"), [("elsewhere:Plain,transformers", 2), ("transformers_like:Plain", 0)]
)
def test_transformers_is_required_where_it_is_named(
    measure: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, code: int
) -> None:
    (tmp_path / "transformers_like.py").write_text(MODULE)

    def missing() -> None:
        raise transformers_layer.TransformersMissing("this needs transformers")

    monkeypatch.setattr(transformers_layer, "require", missing)
    done = measure(names, "--scenario", "decode", "--dry-run")
    assert done.code == code, done.err
    assert ("error: this needs transformers" in done.err) == bool(code)
