"""Ops against each other: `mla[ROLE=OP]` is timed, checked and reported under its own name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla_backends.api import OPS

Bench = Callable[..., Any]

SEVERAL = ("--backend", "several_ops:SeveralOps")
FIRST, SECOND = "mla[latent_attention=first]", "mla[latent_attention=second]"
ABSORBED = ("--scenario", "decode")  # the absorbed path: latent_attention, and linear ops around it


@pytest.fixture
def measure(bench: Bench, small: list[str]) -> Bench:
    """Return `bench` for these implementations and a decode scenario."""

    def measure(names: str, *words: str) -> Any:
        chosen = ["--implementations", names, "-o", "run.json", "--passes", "2", "--runs", "3", "-v"]
        return bench(*SEVERAL, *small, *chosen, *ABSORBED, *words)

    return measure


def cases(path: str = "run.json") -> dict[str, results.Case]:
    run = results.decode(Path(path).read_bytes())
    return {case.implementation: case for case in run.cases}


def test_ops_are_timed_beside_each_other(measure: Bench) -> None:
    reference = "mla-reference[ linear = rows ]"
    names = ["mla", SECOND, "mla[latent_attention=reference,o_proj=reference]", "mla-reference[linear=rows]"]
    done = measure(",".join([*names[:3], reference]))
    assert done.code == 0, done.err
    assert list(cases()) == names
    chosen = [
        (ops_case.ops["latent_attention"], ops_case.ops["kv_b_proj"], ops_case.ops["o_proj"])
        for ops_case in cases().values()
    ]
    assert chosen == [
        ("first", "rows", "rows"),
        ("second", "rows", "rows"),
        ("reference", "rows", "reference"),
        ("reference", "rows", "rows"),
    ]
    for name, case in cases().items():
        assert (case.check.status, case.passes) == ("ok", 2)
        assert case.interleaved_with == [other for other in names if other != name]
        assert [agreement.implementation for agreement in case.agreement] == case.interleaved_with
        assert shlex.split(case.repro)[-2:] == ["--implementations", name]
    assert f"ops        {SECOND}: " in done.err
    assert "same ops" not in done.err


@pytest.mark.parametrize("wrong", ["first", "second"])
def test_the_check_names_the_op_that_is_wrong_and_no_other(measure: Bench, wrong: str) -> None:
    """An op that was not really put in place would be right, or wrong under another name."""
    done = measure(f"{FIRST},{SECOND},mla[latent_attention=reference]", "-O", f"wrong={wrong}")
    assert done.code == 4
    statuses = {name: case.check.status for name, case in cases().items()}
    named = f"mla[latent_attention={wrong}]"
    assert statuses == {name: "wrong" if name == named else "ok" for name in statuses}
    assert cases()[named].latency_ms is None
    assert f"decode, {named}: " in done.out


def test_the_policy_holds_for_every_other_role(measure: Bench) -> None:
    assert measure("mla[o_proj=rows]", "--ops", "reference").code == 0
    assert {role for role, op in cases()["mla[o_proj=rows]"].ops.items() if op != "reference"} == {"o_proj"}
    assert measure("mla[linear=reference,o_proj=rows]", "--ops", "second").code == 0
    (case,) = cases().values()
    assert {role: op for role, op in case.ops.items() if op != "reference"} == {
        "o_proj": "rows",
        "latent_attention": "second",
    }


def test_implementations_that_run_the_same_ops_are_pointed_out(measure: Bench) -> None:
    done = measure(f"mla,{FIRST},{SECOND}", "--dry-run")
    assert f"same ops   {FIRST} runs the ops of mla: a difference between them is noise\n" in done.err
    assert done.err.count("same ops") == 1
    assert re.findall(r"^\d +decode +(\S+)", done.err, re.MULTILINE) == ["mla", FIRST, SECOND]
    assert " of forwards, plus limits and float64 oracle" in done.err


def test_one_op_alone_is_compared_the_same_way(bench: Bench, small: list[str]) -> None:
    names = f"{FIRST},{SECOND},mla-reference"
    words = ["--op", "latent_attention", "--implementations", names, "--runs", "2", "--passes", "2"]
    done = bench(*SEVERAL, *small[:2], "--cache", "warm", *words, "-O", "wrong=second", "-o", "run.json")
    assert done.code == 4
    assert {name: (case.ops["latent_attention"], case.check.status) for name, case in cases().items()} == {
        FIRST: ("first", "ok"),
        SECOND: ("second", "wrong"),
        "mla-reference": ("reference", "ok"),
    }


def test_brackets_that_the_op_does_not_read_are_a_mistake(bench: Bench, small: list[str]) -> None:
    def dry(op: str, names: str) -> Any:
        return bench(*SEVERAL, *small[:2], "--op", op, "--implementations", names, "--dry-run")

    done = dry("o_proj", f"mla,{FIRST}")
    assert done.code == 2
    assert done.error == (
        f"error: --op times o_proj alone, and the brackets of '{FIRST}' give it no op: name o_proj there, "
        f"or leave '{FIRST}' out."
    )
    assert dry("linear", FIRST).error.endswith(f": name one of them there, or leave '{FIRST}' out.")
    for names in ("mla[o_proj=rows]", "mla[linear=rows],mla-reference[latent_attention=first,o_proj=rows]"):
        assert dry("o_proj", names).code == 0


def test_the_repro_line_of_a_role_is_accepted_where_brackets_name_another(
    bench: Bench, small: list[str]
) -> None:
    names = "mla[o_proj=reference]"
    words = ["--op", "linear", "--implementations", names, "--runs", "2", "--passes", "2", "-o", "run.json"]
    assert bench(*SEVERAL, *small[:2], "--cache", "warm", *words).code == 0
    run = results.decode(Path("run.json").read_bytes())
    assert len(run.cases) > 1
    for case in run.cases:
        done = bench(*shlex.split(case.repro)[3:], "-o", "again.json")
        assert done.code == 0, done.err
        (again,) = cases("again.json").values()
        assert (again.scenario, again.ops) == (case.scenario, case.ops)


def test_each_is_listed_with_its_ops_and_reasons(measure: Bench) -> None:
    done = measure(f"mla,{SECOND}", "--list-ops")
    assert done.code == 0
    plain, second = done.out.split(f"{SECOND}:\n")
    assert "\nlatent_attention: first\n" in plain
    assert "\n  latent_attention: second\n" in second


KINDS = ", ".join(OPS)


@pytest.mark.parametrize(
    ("names", "code", "sentence"),
    [
        (
            "mla[latent_atention=first]",
            2,
            "unknown role 'latent_atention'. Did you mean 'latent_attention'? "
            f"mla[ROLE=OP] takes as ROLE: {KINDS}, qkv_a_proj, ",
        ),
        (" , ", 2, "--implementations is empty: leave it out, or list what to time."),
        (
            "mla[q_b_proj=rows]",
            2,
            "a layer of config 'tiny.json' has no q_b_proj, because it does not compress ",
        ),
        (
            "mla[latent_attention=frist]",
            2,
            "unknown op of role latent_attention 'frist'. Did you mean 'first'? It ",
        ),
        (
            "mla[latent_attention=rows]",
            2,
            "unknown op of role latent_attention 'rows'. It takes: reference, f",
        ),
        (
            "mla,mla[latent_attention=picky]",
            3,
            "no fused latent_attention serves this layer, but latent_attention=picky requires one: fused op "
            "'picky' not used because it has no kernel for this layer.",
        ),
        (
            "mla[rotate_query=old]",
            3,
            "no fused rotate_query serves this layer, but rotate_query=old requires one: fused op 'old' not "
            "used because it implements rotate_query/0 and this core calls rotate_query/1.",
        ),
        ("transformers[linear=rows]", 2, "'transformers[linear=rows]': transformers cannot be given ops in "),
        ("mla[linear=rows", 2, "--implementations takes NAME or NAME[ROLE=OP,...], got 'mla[linear=rows'."),
        (f"{FIRST},{FIRST}", 2, f"--implementations names '{FIRST}' twice: it is measured once."),
        ("vllm,mla[linear=rows]", 2, "unknown implementation 'vllm'."),
    ],
)
def test_a_mistake_gets_its_sentence_before_anything_runs(
    measure: Bench, names: str, code: int, sentence: str
) -> None:
    done = measure(names)
    assert (done.code, done.out) == (code, "")
    assert done.error.startswith(f"error: {sentence}")
    assert not Path("run.json").exists()
