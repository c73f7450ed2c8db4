"""Kernels that are compiled at first use: tried before anything is timed, announced, reported everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Bench = Callable[..., Any]

# A virtual device whose op must be compiled. It notes in a file what it is asked, and when it is timed.
PREP = """
import time
from mla.reference import REFERENCE
from mla_backends.testing import HostBackend

def log(line):
    with open("log.txt", "a") as file:
        print(line, file=file)

class Compiled(type(REFERENCE["latent_attention"])):
    compiles = "it compiles its kernel (a minute)"
    def preflight(self, spec):
        log(f"preflight {spec.num_heads}")
        ANSWER

class Prep(HostBackend):
    name = "prep"
    def __init__(self, options=None):
        super().__init__(options, ops={"mine": Compiled(), "spare": type(REFERENCE["latent_attention"])()})
    def probe(self):
        log("probe")
        return super().probe()
    def synchronize(self):
        log("synchronize")
"""
LINE = "preparing mine: it compiles its kernel (a minute)"
SHORT_RUN = ("--implementations", "mla", "--scenario", "decode")
WHY = "fused op 'mine' not used because there is no compiler"


@pytest.fixture
def prep(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Return a function that writes such a backend, whose preflight ends with a statement; gives its name."""

    monkeypatch.syspath_prepend(tmp_path)

    def prep(answer: str) -> str:
        module = f"prep_{abs(hash(request.node.nodeid))}"  # one module per test: they share a process
        (tmp_path / f"{module}.py").write_text(PREP.replace("ANSWER", answer))
        return f"{module}:Prep"

    return prep


def logged() -> list[str]:
    return Path("log.txt").read_text().splitlines()


def test_a_run_prepares_each_kernel_once_before_anything_is_timed(
    bench: Bench, prep: Any, small: list[str]
) -> None:
    done = bench("--backend", prep("return []"), *small, *SHORT_RUN, "-a", "heads=2,4", "-o", "run.json")
    assert done.code == 0, done.err
    assert done.err.splitlines().count(LINE) == 2  # per spec
    events = [line for line in logged() if line != "probe"]
    assert sorted(events[:2]) == ["preflight 2", "preflight 4"]
    assert set(events[2:]) == {"synchronize"}
    cases = json.loads(Path("run.json").read_text())["cases"]
    assert {case["ops"]["latent_attention"] for case in cases} == {"mine"}
    assert LINE not in done.out


def test_a_kernel_that_cannot_be_prepared_gives_way_with_its_reason(
    bench: Bench, prep: Any, small: list[str]
) -> None:
    name = prep("return ['there is no compiler']")
    done = bench("--backend", name, *small, "--list-ops")
    assert done.code == 0
    at = done.out.splitlines().index("latent_attention: spare")
    assert done.out.splitlines()[at + 1].strip() == WHY
    assert bench("--backend", name, *small, *SHORT_RUN, "-o", "run.json").code == 0
    cases = json.loads(Path("run.json").read_text())["cases"]
    assert {case["ops"]["latent_attention"] for case in cases} == {"spare"}


def test_what_an_op_says_of_itself_is_listed_said_once_and_kept(
    bench: Bench, prep: Any, small: list[str]
) -> None:
    """A tile may turn out too large before anything is timed, or later."""
    later = "type(self).prepare = lambda op, *given: op.remarks.append('late') or super(type(op), op)"
    name = prep("self.remarks = ['small tile']; " + later + ".prepare(*given); return []")
    done = bench("--backend", name, *small, *SHORT_RUN, "-v", "-a", "heads=2,4", "-o", "run.json")
    lines = done.err.splitlines()
    assert lines.count("mine: small tile") == lines.count("mine: late") == 1
    assert lines.index("mine: small tile") < next(i for i, line in enumerate(lines) if "scenario " in line)
    for case in json.loads(Path("run.json").read_text())["cases"]:
        assert set(case["op_remarks"]["mine"]) == {"small tile", "late"}
    done = bench("--backend", name, *small, "--list-ops")
    at = done.out.splitlines().index("latent_attention: mine")
    assert done.out.splitlines()[at + 1] == "  small tile"


def test_one_op_alone_is_prepared_too(bench: Bench, prep: Any, small: list[str]) -> None:
    name = prep("raise OSError('no space left\\nin the cache')")
    words = ("--op", "latent_attention", "--batch", "2", "--kv", "70", "--passes", "1", *small[:2])
    done = bench("--backend", name, *words, "--ops", "mine")
    assert done.code != 0
    assert done.error.startswith(
        "error: no fused latent_attention serves this layer, but --ops mine requires"
    )
    assert "its preflight raised OSError: no space left" in done.error


@pytest.mark.parametrize("policy", ["auto", "fused"])
def test_an_op_of_another_role_is_neither_prepared_nor_required(
    bench: Bench, prep: Any, small: list[str], policy: str
) -> None:
    name = prep("raise OSError('no space left')")
    words = ("--op", "rotate_query", "--batch", "2", "--passes", "1", *small[:2])
    done = bench("--backend", name, *words, "--ops", policy, "-o", "run.json")
    assert done.code == 0, done.err
    assert not [line for line in logged() if line.startswith("preflight")]
    assert LINE not in done.err
    cases = json.loads(Path("run.json").read_text())["cases"]
    assert [case["ops"] for case in cases] == [{"rotate_query": "reference"}]


def test_the_doctor_prepares_kernels_and_a_probe_does_not(process: Bench, prep: Any) -> None:
    name = prep("return ['there is no compiler']")
    done = process("doctor", name, "--json")
    assert done.code == 0
    (diagnosis,) = json.loads(done.out)["backends"]
    assert diagnosis["facts"]["ops"]["latent_attention"] == {"implementation": "spare", "reasons": [WHY]}
    assert logged()[0] == "probe"  # in a process of its own, which ended with that
    assert logged().count("preflight 16") == 1
