"""The sections as data: limits, commands that parse, questions that exist."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import ask, dry_run
from benchmarks.gpu.questions import flashinfer
from benchmarks.gpu.questions.asking import QUESTIONS
from benchmarks.gpu.sections import sections
from benchmarks.gpu.sizes import HERE
from benchmarks.gpu.steps import MOST_SECONDS, Machine, Section, Step
from benchmarks.gpu.tuning.classes import FULL

OPS = {
    "latent_attention": ["flash_mla", "flashinfer", "tokenspeed_decode"],
    "expanded_attention": ["flash_attn_3", "flash_attn", "sdpa"],
    "linear": ["fast_linear"],
}
CARD = Machine("nvidia", "NVIDIA H100 80GB HBM3", ops=OPS)


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("backend", ["nvidia", "moore", "cpu"])
def test_no_section_takes_more_than_ten_minutes(backend: str, smoke: bool) -> None:
    for ops in ({}, OPS, {"latent_attention": [f"op{i}" for i in range(20)]}):
        for section in sections(replace(CARD, backend=backend, ops=ops), smoke):
            assert 0 < section.limit <= MOST_SECONDS, section.name
            assert len({step.name for step in section.steps}) == len(section.steps)


def test_kernels_are_compiled_before_any_limit_that_has_no_room_for_it() -> None:
    first, *rest = sections(CARD)
    assert [step.limit >= 150 for step in first.steps] == [True] * 3
    assert {"--list-ops", "ops.preflight"} <= {word for step in first.steps for word in step.words}
    doctor = next(step for one in rest for step in one.steps if step.name == "doctor")
    assert doctor.limit >= 300


def test_a_question_outlasts_the_processes_that_it_starts() -> None:
    limit = {step.name: step.limit for one in sections(CARD) for step in one.steps}["flashinfer-compiler"]
    assert limit >= 2 * flashinfer.CHILD_SECONDS + 20


def test_every_absorbed_attention_is_compared_inside_the_layer() -> None:
    (found,) = [section for section in sections(CARD) if section.name == "choices"]
    compared = [step.words[step.words.index("--implementations") + 1] for step in found.steps[1:]]
    assert compared == [
        f"mla,mla[latent_attention={name}],mla[latent_attention=reference]"
        for name in OPS["latent_attention"]
    ]


def test_all_kernels_take_turns_and_the_layer_is_also_timed_with_our_own() -> None:
    ours = {op: [*names, f"triton_{op.split('_')[0]}"] for op, names in OPS.items() if op != "linear"}
    (found,) = [one for one in sections(replace(CARD, ops=ours)) if one.name == "rivals"]
    heads = [step.name for step in found.steps if "rivals.py" in step.words[0]]
    assert heads == [
        "latent-heads-16", "latent-heads-64", "latent-heads-128", "expanded-heads-16", "expanded-heads-128",
    ]  # fmt: skip
    own = "mla[latent_attention=triton_latent,expanded_attention=triton_expanded]"
    assert [own in step.words for step in found.steps] == [False] * 5 + [True] * 2
    (without,) = [one for one in sections(CARD) if one.name == "rivals"]
    assert len(without.steps) == 5


def test_kernels_take_turns_with_the_tuning_that_was_found_before(tmp_path: Path) -> None:
    reads = replace(CARD, options=("graph", "tuning"))
    names = [one.name for one in sections(reads)]
    assert names.index("tune") < names.index("rivals")
    step = next(one for one in sections(reads) if one.name == "rivals").steps[0]
    for name in ("tune", "rivals"):
        (tmp_path / name).mkdir()
    result = step.result(tmp_path / "rivals", CARD.stem)
    assert "-O" not in step.command(result, 60, resume=False)
    target = tmp_path / "tune" / "tuning-nvidia-h100-80gb-hbm3.json"
    target.write_text("{}")
    words = step.command(result, 60, resume=False)
    assert words[words.index("-O") + 1] == f"tuning={target}"
    deaf = next(one for one in sections(CARD) if one.name == "rivals").steps[0]
    assert "-O" not in deaf.command(result, 60, resume=False)


def test_a_sweep_per_class_of_calls_comes_before_the_tuning_that_is_named_after_the_card() -> None:
    (found,) = [one for one in sections(CARD) if one.name == "tune"]
    *sweeps, choose = found.steps
    assert [step.words[2] for step in sweeps] == [one.name for one in FULL]
    out = choose.result(Path("tune"), CARD.stem)
    assert out == Path("tune/tuning-nvidia-h100-80gb-hbm3.json")
    assert choose.command(out, 9, resume=False)[1:] == ["choose", "--out", str(out)]
    assert sweeps[0].command(Path("x"), 100, resume=True)[-4:] == ["--out", "x", "--budget", "90s"]


@pytest.mark.parametrize("smoke", [False, True])
def test_every_command_parses(smoke: bool, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = sections(CARD, smoke)
    assert dry_run.dry_run(CARD, wanted, Path("out")) == 0
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if line.startswith("timeout -k ")]) == sum(len(s.steps) for s in wanted)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("-m", "mla.bench", "--no-such-option"), "No such option"),
        (("-m", "mla.bench", "--op", "latent_attention", "--batch", "many"), "not a valid integer"),
        (("-m", "mla.bench", "ceilings", "--dry-run"), "No such option"),
        (("-m", "mla.bench", "doctr"), "doctr"),
        (("-m", "mla.conformance", "--quick", "--dtype", "int4"), "int4"),
        ((str(HERE / "rivals.py"), "--op", "latent_attention", "--head", "16"), "--head"),
        ((str(HERE / "tune.py"), "sweep", "latent-17", "--out", "x"), "latent-17"),
        (("/no/such/file.py",), "there is no file"),
    ],
)
def test_a_command_that_does_not_parse_is_named(
    words: tuple[str, ...], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [Section("one", "One", (Step("bad", words, 10), Step("good", ("-m", "mla.bench", "list"), 10)))]
    assert dry_run.dry_run(CARD, wanted, Path("out")) == 1
    said = capsys.readouterr().out
    assert said.count("# wrong: ") == 1
    assert fault in said


def test_the_runner_itself_is_asked_where_there_is_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    """Options that parse one by one, and that only the runner's own --dry-run refuses."""
    words = ("-m", "mla.bench", "--backend", "cpu", "--op", "latent_attention", "--scenario", "decode")
    host = Machine("cpu", "host", True)
    assert dry_run.dry_run(host, [Section("one", "One", (Step("bad", words, 10, "run"),))], Path("out")) == 1
    assert "--scenario" in capsys.readouterr().out.partition("# wrong: ")[2]


def test_every_kernel_of_the_backend_has_a_run_and_every_question_a_probe() -> None:
    ask.load()
    by_name = {section.name: section for section in sections(CARD)}
    kernels = [step for step in by_name["kernels"].steps if step.kind == "run"]
    insisted = [step.words[step.words.index("--ops") + 1] for step in kernels]
    assert insisted == [*OPS["latent_attention"], *OPS["expanded_attention"]]
    asked = {step.name for one in by_name.values() for step in one.steps if step.kind == "question"}
    assert asked == set(QUESTIONS) - {"flashinfer-first"}, "that one is asked by flashinfer-compiler"
    assert by_name["libraries"].steps[-1].name == "flashinfer-items", "it may leave the device unusable"


@pytest.mark.parametrize(
    ("card", "stem"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("Tesla T4", "nvidia-tesla-t4"),
        ("unknown", "nvidia-unknown"),
    ],
)
def test_files_are_named_after_the_card(card: str, stem: str) -> None:
    assert Machine("nvidia", card).stem == stem
