"""The sections as data: limits, commands that parse, questions that exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import ask, dry_run
from benchmarks.gpu.questions import flashinfer
from benchmarks.gpu.questions.asking import QUESTIONS
from benchmarks.gpu.questions.latent import LATENT, ROTARY
from benchmarks.gpu.report.targets import LARGE_BYTES, TARGETS, Share
from benchmarks.gpu.sections import first_hour, sections
from benchmarks.gpu.sizes import HERE
from benchmarks.gpu.steps import MOST_SECONDS, Machine, Section, Step
from benchmarks.gpu.tuning.classes import FULL
from mla.bench.workload import grid
from mla.conformance.registry import all_checks, matches
from mla_backends.triton_ops.tuning import card_file

OPS = {
    "latent_attention": ["flash_mla", "flashinfer", "tokenspeed_decode"],
    "expanded_attention": ["flash_attn_3", "flash_attn", "sdpa"],
    "linear": ["fast_linear"],
}
Plan = Callable[[Machine, bool], tuple[Section, ...]]
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


def section(name: str, machine: Machine = CARD, smoke: bool = False) -> Section:
    return next(one for one in sections(machine, smoke) if one.name == name)


def test_all_kernels_take_turns_the_shapes_that_are_judged_first() -> None:
    names = [one.name for one in sections(CARD) if one.name.startswith("rivals")]
    assert names == ["rivals-16", "rivals-128", "rivals"]
    steps = [step for name in names for step in section(name).steps]
    assert all("rivals.py" in step.words[0] for step in steps)
    assert len({step.name for step in steps}) == len(steps), "the table has one place for each"
    assert [step.name for step in section("rivals").steps] == [
        "latent-heads-16", "latent-heads-64", "latent-heads-128", "expanded-heads-16", "expanded-heads-128",
    ]  # fmt: skip


@pytest.mark.parametrize("target", [one.look for one in TARGETS if isinstance(one.look, Share)])
def test_shares_are_judged_on_shapes_that_have_a_step_and_time_of_their_own(target: Share) -> None:
    def keys(step: Step) -> list[int]:
        axes = grid.parse([word for word in step.words if word.startswith(("batch=", "kv="))])
        return [int(batch) * int(kv) for batch in axes["batch"] for kv in axes["kv"]]

    key_bytes, every = 2 * (LATENT + ROTARY), {}
    for step in section(f"rivals-{target.heads}").steps:
        assert step.words[step.words.index("--heads") + 1] == str(target.heads)
        (every[step.name],) = keys(step)
        assert step.limit >= 150
    assert all(count * key_bytes >= LARGE_BYTES for count in every.values())
    assert len(every) == 3
    small = section("rivals").steps[0]
    assert max(keys(small)) * key_bytes < LARGE_BYTES, "nothing large among the small ones"


def test_the_layer_is_also_timed_with_our_own_kernels_and_has_as_long_as_in_the_standard_scenarios() -> None:
    own = section("own-layers")
    assert {step.words[step.words.index("--implementations") + 1] for step in own.steps} == {
        "mla[latent_attention=triton_latent,expanded_attention=triton_expanded]"
    }
    limits = {step.name: step.limit for step in section("standard").steps}
    assert {step.name: step.limit for step in own.steps} == {f"own-{name}": s for name, s in limits.items()}


def selected(name: str) -> list[str]:
    """Return the names of checks that a section of the conformance suite runs."""
    patterns = [
        word
        for step in section(name).steps
        for flag, word in zip(step.words, step.words[1:], strict=False)
        if flag == "--only"
    ]
    return [one.id for one in all_checks() for pattern in patterns if matches(pattern, one.id)]


@pytest.mark.parametrize("name", ["conformance", "conformance-full", "conformance-float16"])
def test_the_parts_of_the_conformance_suite_are_the_whole_suite(name: str) -> None:
    assert sorted(selected(name)) == sorted(one.id for one in all_checks())


def test_conformance_goes_by_dtype_and_leaves_room_for_compilers() -> None:
    """Specializations of our kernels by step, counted with a launcher that starts nothing."""
    counted = {
        "conformance": {"latent": 133, "pointwise": 113, "rest": 65},
        "conformance-heads": {"heads": 362},
        "conformance-full": {"latent": 453 - 362, "pointwise": 113, "rest": 70},
    }
    for name, kernels in counted.items():
        limits = {step.name: step.limit for step in section(name).steps}
        assert limits.keys() == kernels.keys()
        assert all(limits[step] >= 1.2 * count for step, count in kernels.items())
    dtypes = {
        one.name: {step.words[step.words.index("--dtype") + 1] for step in one.steps}
        for one in sections(CARD) if one.name.startswith("conformance")
    }  # fmt: skip
    assert dtypes == {
        "conformance": {"bfloat16"}, "conformance-heads": {"bfloat16"}, "conformance-full": {"bfloat16"},
        "conformance-float16": {"float16"}, "conformance-float32": {"float32"},
    }  # fmt: skip
    order = [one.name for one in sections(CARD)]
    assert order.index("conformance-heads") < order.index("conformance-full"), "its limit counts on the other"


def test_kernels_take_turns_with_the_tuning_that_was_found_before(tmp_path: Path) -> None:
    reads = replace(CARD, options=("graph", "tuning"))
    names = [one.name for one in sections(reads)]
    assert names.index("tune") < names.index("rivals")
    step = next(one for one in sections(reads) if one.name == "rivals").steps[0]
    for name in ("tune", "rivals"):
        (tmp_path / name).mkdir()
    result = step.result(tmp_path / "rivals", CARD.stem)
    assert "-O" not in step.command(result, 60, resume=False)
    target = tmp_path / "tune" / card_file(CARD.card)
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
    assert out == Path("tune/nvidia-h100-80gb-hbm3.json")
    assert choose.command(out, 9, resume=False)[1:] == ["choose", "--backend", "nvidia", "--out", str(out)]
    assert sweeps[0].command(Path("x"), 100, resume=True)[-4:] == ["--out", "x", "--budget", "90s"]


def test_the_first_hour_is_less_than_one_and_the_most_valuable_comes_first() -> None:
    hour = first_hour(replace(CARD, options=("tuning",)))
    assert [one.name for one in hour] == [
        "compile", "facts", "rivals-16", "rivals-128", "own-layers", "conformance", "tune",
        "rivals-16-tuned", "rivals-128-tuned", "choices",
    ]  # fmt: skip
    assert sum(one.limit for one in hour) <= 45 * 60
    longest = max(step.limit for one in hour for step in one.steps)
    assert longest <= MOST_SECONDS - 300, "a command that also installs and compiles has time for it"
    by_name = {one.name: one for one in hour}
    tiles, libraries = by_name["compile"].steps
    assert tiles.words[1] == "compile"
    assert libraries in sections(CARD)[0].steps, "no later limit has to hold what libraries compile"
    for name in ("rivals-16", "rivals-128"):
        (before,), (after,) = by_name[name].steps, by_name[f"{name}-tuned"].steps
        assert before == after, "so that the later one takes the earlier one's place in the table"
        assert {"batch=32", "kv=64k"} <= set(before.words)
        assert before.tuning == f"../tune/{card_file(CARD.card)}"
    assert [step.name for step in by_name["choices"].steps] == ["profile"]


@pytest.mark.parametrize("plan", [sections, first_hour])
@pytest.mark.parametrize("smoke", [False, True])
def test_every_command_parses(plan: Plan, smoke: bool, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = plan(CARD, smoke)
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
    assert "scenario 'decode' has none" in capsys.readouterr().out.partition("# wrong: ")[2]


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
