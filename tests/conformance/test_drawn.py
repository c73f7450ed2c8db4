"""Drawn cases: what they find, how little of it is shown, and how long they may take."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from wrong_ops.base import after, changing, mutant, spoiling

from mla.cases.case import OpCase
from mla.cases.drawn import Field, scenes
from mla.cases.memory import Layout
from mla.cases.played import Player, Scene
from mla.cases.stress import Stress, slots
from mla.command.exit_codes import Exit
from mla.conformance import cli, suite
from mla.conformance.checks.borders import GROUPS
from mla.conformance.cli import ENDING, Options, main
from mla.conformance.drawn import FORMAT, Search, _search
from mla.conformance.report import CheckResult
from mla.conformance.selection import Xfails
from mla.conformance.suite import Suite
from mla.conformance.trial import Drawing
from mla.reference import REFERENCE
from mla_backends.api import AttentionSpec, LinearSpec, NormSpec
from mla_backends.errors import BackendError

Run = Callable[..., list[CheckResult]]
FAULTY = "faulty_backend:FaultyBackend"
FEW_DRAWS = 12  # draws of a right op: enough to see that it runs, too few to see that it is right
REF_DRAWS = 25  # of the reference, in each of its forms


def add_rarely(given: dict[str, Any]) -> None:
    """Be wrong where there are more than 40 rows of more than 100 features."""
    rows, features = given["x"].shape
    if rows > 40 and features > 100:
        given["out"][-1] += 1


Rarely = functools.partial(after, "rms_norm", add_rarely)


class ServesNothing(type(REFERENCE["rms_norm"])):  # type: ignore[misc]
    def unsupported_reasons(self, spec: Any) -> list[str]:
        return ["never"]


class FirstTime(type(REFERENCE["linear"])):  # type: ignore[misc]
    """Wrong in the first call of a packed weight."""

    def pack(self, weight: torch.Tensor) -> Any:
        self.called = False
        return super().pack(weight)

    def __call__(self, packed: Any, *, out: torch.Tensor, **rest: Any) -> None:
        super().__call__(packed, out=out, **rest)
        out += 0 if self.called else 1
        self.called = True


def add(right: Any, *, out: torch.Tensor, **rest: Any) -> None:
    """Add to what `out` held."""
    before = out.clone()
    right(out=out, **rest)
    out += before


def refuse(right: Any, **tensors: Any) -> None:
    raise BackendError("never")


def drawn(judge: Run, backend: Any, kind: str, count: int) -> CheckResult:
    (result,) = judge(backend, f"{kind}.drawn[mine-*]", drawing=Drawing(count))
    return result


IN_PARTS: dict[str, Any] = {
    "mla.reference.attention.queries_per_call": lambda heads, keys: 4,
    "mla.reference.sparse.LOGITS_BYTES": 1 << 16,
    "mla.reference.sparse.KEYS_BYTES": 1 << 16,
    "mla.reference.small.writes_in_place": lambda device, dtype: True,
}


@pytest.mark.parametrize("parts", [{}, IN_PARTS], ids=["whole", "in parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(REFERENCE))
def test_the_reference_is_right(
    judge: Run,
    sound: Any,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: torch.dtype,
    parts: dict[str, Any],
) -> None:
    for name, value in parts.items():
        monkeypatch.setattr(name, value)
    only, drawing = f"{GROUPS.get(kind, kind)}.drawn[reference-*]", Drawing(REF_DRAWS, seed=len(parts))
    (result,) = judge(sound(), only, dtypes=(dtype,), drawing=drawing)
    assert (result.status, result.reason) == (
        "incomplete",
        f"{REF_DRAWS} of 300 drawn cases were judged",
    )
    assert result.drawn is not None
    assert (result.drawn.judged, result.drawn.refused, result.drawn.seed) == (REF_DRAWS, 0, len(parts))
    assert {"numbers", "calls", "memory"} <= set(result.drawn.along)


def test_the_smallest_wrong_case_is_shown(judge: Run, sound: Any) -> None:
    result = drawn(judge, sound(ops={"mine": Rarely()}), "rms_norm", 300)
    assert result.status == "fail"
    shown = re.match(r"(\d+) tokens, (\d+) features: out: 1 of \1 rows are wrong", result.failures[0].reason)
    assert shown is not None, result.failures[0].reason
    assert 41 <= int(shown[1]) <= 64
    assert 101 <= int(shown[2]) <= 128


@pytest.mark.parametrize(
    ("op", "kind", "said"),
    [
        (FirstTime, "linear", "it is right the second time"),
        (lambda: mutant("rotate_query", add), "rotate_query", "it depends on what the output held before"),
    ],
)
def test_a_wrong_case_says_what_it_is_right_with(
    judge: Run, sound: Any, op: Any, kind: str, said: str
) -> None:
    assert said in drawn(judge, sound(ops={"mine": op()}), kind, 100).failures[0].reason


def test_one_seed_gives_one_sequence(judge: Run, sound: Any) -> None:
    along = [
        judge(sound(), "rms_norm.drawn", drawing=Drawing(count, seed=seed))[0].drawn.along["rows"]  # type: ignore[union-attr]
        for count, seed in ((8, 3), (8, 3), (8, 4))
    ]
    assert along[0] == along[1] != along[2]


def test_a_check_that_has_no_time_left_is_incomplete_and_not_refused(judge: Run, sound: Any) -> None:
    """A run whose other checks took too long would end as if all that is served were right."""
    (result,) = judge(sound(), "rms_norm.drawn", drawing=Drawing())
    assert (result.status, result.reason) == ("incomplete", "1 of 300 drawn cases were judged")
    (mine, _) = judge(sound(ops={"mine": ServesNothing()}), "rms_norm.drawn", drawing=Drawing())
    assert (mine.status, mine.reason) == ("refused", "never")


@pytest.mark.parametrize(("words", "code"), [((), 7), (("--quick",), 0)], ids=["whole", "a first look"])
def test_only_a_whole_run_ends_as_incomplete(words: tuple[str, ...], code: int) -> None:
    backend = ("--backend", "mla_backends.testing:HostBackend", "--dtype", "float32")
    assert main([*backend, *words, "--only", "rms_norm.drawn", "--draws", "2"]) == code


def test_too_few_draws_are_incomplete_and_a_kept_failure_comes_first(
    sound: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--backend", FAULTY, "--only", "rms_norm.drawn", "--dtype", "float32"]
    words += ["-O", "op=rms_norm", "--report", "out.json", "--draws"]
    assert main([*words, "3"]) == 7
    assert "1 incomplete" in capsys.readouterr().out
    monkeypatch.setattr(suite, "MIN_DRAWS", 3)
    assert main([*words, "3"]) == 0
    monkeypatch.setattr("faulty_backend.FaultyBackend.ops", lambda self: {"mine": Rarely()})
    assert main([*words, "300", "--dump-failure", "kept"]) == 4
    assert "the first wrong call is kept" in capsys.readouterr().err
    assert main([*words, "300", "--dump-failure", "kept"]) == 4
    (check,) = json.loads(Path("out.json").read_bytes())["checks"]
    assert (check["drawn"]["judged"], check["drawn"]["kept"]) == (0, 1)


# ------------------------------------------------------------------------------------- what is drawn

CPU = torch.device("cpu")


def drawn_scenes(of: Field, count: int) -> list[Scene]:
    """Return the scenes of the first numbers."""
    drawn: list[Scene] = []
    search = Search(scenes(of), lambda scene: drawn.append(scene) or "")  # type: ignore[func-returns-value]
    for number in range(count):
        search.run(number)
    return drawn


@pytest.fixture(scope="module")
def writes() -> list[Scene]:
    """Return scenes of a write to a cache as wide as most are."""
    return drawn_scenes(Field("write_latent", torch.float32, CPU, lambda spec: spec.kv_lora_rank == 512), 600)


def test_cases_in_the_same_memory_differ_in_nothing_but_numbers(writes: list[Scene]) -> None:
    alike = [scene for scene in writes if scene.one_memory]
    assert alike
    for scene in alike:
        first, second = scene.cases
        assert (first.layout, first.eps, first.interleaved) == (
            second.layout,
            second.eps,
            second.interleaved,
        )
        assert (first.spec, first.lengths) == (second.spec, second.lengths)


def test_some_writes_are_large_and_some_far(writes: list[Scene]) -> None:
    cases = [scene.cases[0] for scene in writes]
    assert any(case.rows > 455 for case in cases)
    far = [case for case in cases if case.layout.pages]
    assert any(int(slots(case)[0].max()) > 1 << 15 for case in far if case.rows)


def flush(numbers: torch.Tensor) -> torch.Tensor:
    """Take denormals for zeros, as some devices do."""
    return torch.where(numbers.abs() < torch.finfo(numbers.dtype).tiny, 0, numbers)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("others", [(), ("all zero",), ("weights of zero",)])
def test_denormals_may_be_flushed(width: int, others: tuple[str, ...]) -> None:
    values = tuple(sorted(("denormals", *others)))
    spec = NormSpec(width, torch.float32, CPU)
    norm = OpCase("rms_norm", spec, (7,), (7,), stress=Stress(), values=values)
    assert Player(changing("rms_norm", "x", flush), lambda case: None).play(Scene((norm,))) == ""
    if others != ("weights of zero",):
        of = AttentionSpec(2, width, 8, 4, 8, 0.3, torch.float32, CPU)
        latent = OpCase(
            "latent_attention", of, (1, 2), (9, 4), stress=Stress(), values=values, layout=Layout(4)
        )
        flushes = changing("latent_attention", "cache", flush)
        assert Player(flushes, lambda case: None).play(Scene((latent,))) == ""


NORM = OpCase("rms_norm", NormSpec(24, torch.float32, CPU), (7,), (7,), stress=Stress())


class WritesAgain(type(REFERENCE["rms_norm"])):  # type: ignore[misc]
    """Makes the call before this one again."""

    before: Any = None

    def __call__(self, **tensors: Any) -> None:
        if self.before is not None:
            super().__call__(**self.before)
        super().__call__(**tensors)
        self.before = tensors


def test_each_of_many_calls_is_judged() -> None:
    calls = itertools.count(1)
    once = spoiling("rms_norm", lambda out: out.add_(next(calls) == 50))
    said = Player(once, lambda case: None).play(Scene((NORM,), order=((0, 100),)))
    assert said.startswith("call 50 of 100: out: ")


def test_what_has_returned_neither_reads_nor_writes() -> None:
    """Inputs are overwritten after a call, so that whoever reads them later shows it in an output."""
    two = Scene((NORM, NORM.but(seed=1)), order=((0, 1), (1, 1)))
    assert Player(REFERENCE["rms_norm"], lambda case: None).play(two) == ""
    said = Player(WritesAgain(), lambda case: None).play(two)
    assert said == "call 2 of 2: an output of an earlier call was written again"


class OneWay(type(REFERENCE["latent_attention"])):  # type: ignore[misc]
    """Serves pages of 64 and one new token of every request."""

    def unsupported_batch(self, spec: Any, new: Any, keys: Any, page_size: int | None = None) -> list[str]:
        few = {*new} == {1} and page_size in (None, 64)
        return [] if few else ["it serves pages of 64 and one token each"]


def seventh(right: Any, *, x: torch.Tensor, **rest: Any) -> None:
    """Refuse most of what it is given."""
    if x.shape[0] % 7:
        raise BackendError("it takes rows by the seven")
    right(x=x, **rest)


def later(calls: Iterator[int], right: Any, **tensors: Any) -> None:
    """Refuse 80 calls in a row, after 20 that it made."""
    if 20 < next(calls) <= 100:
        raise BackendError("not now")
    right(**tensors)


def test_what_an_op_takes_is_drawn(judge: Run, sound: Any) -> None:
    (result,) = judge(sound(ops={"mine": OneWay()}), "latent.drawn[mine-*]", drawing=Drawing(FEW_DRAWS))
    assert result.drawn is not None
    assert (result.drawn.judged, result.drawn.refused) == (FEW_DRAWS, 0)


def test_draws_are_those_that_are_judged(judge: Run, sound: Any) -> None:
    def of(body: Any, count: int = FEW_DRAWS) -> CheckResult:
        return drawn(judge, sound(ops={"mine": mutant("rms_norm", body)}), "rms_norm", count)

    counted = of(seventh).drawn
    assert counted is not None
    assert counted.judged == FEW_DRAWS
    assert counted.refused > FEW_DRAWS
    assert of(functools.partial(later, itertools.count(1)), 30).drawn.judged == 30  # type: ignore[union-attr]
    assert of(refuse).status == "refused"
    (fixed,) = judge(sound(ops={"mine": mutant("rms_norm", seventh)}), "rms_norm.formula[mine-*]")
    assert (fixed.status, fixed.cases.passed, fixed.cases.refused) == ("pass", 2, 2)


class FewGroups(type(REFERENCE["batched_linear"])):  # type: ignore[misc]
    """Serves up to 4 groups."""

    def __init__(self) -> None:
        self.groups: list[int] = []

    def unsupported_reasons(self, spec: Any) -> list[str]:
        return ["it serves 4 groups"] if spec.groups > 4 else []

    def __call__(self, packed: Any, *, x: torch.Tensor, out: torch.Tensor) -> None:
        self.groups.append(x.shape[1])
        super().__call__(packed, x=x, out=out)


def test_an_op_of_few_groups_is_drawn_for_with_as_many_as_it_serves(judge: Run, sound: Any) -> None:
    op = FewGroups()
    drawn(judge, sound(ops={"mine": op}), "batched_linear", FEW_DRAWS)
    assert op.groups.count(4) > FEW_DRAWS / 4


def test_the_largest_products_have_a_row(judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla.cases.drawn.MAX_PRODUCTS", 1)
    counted = drawn(judge, sound(ops={"mine": REFERENCE["linear"]}), "linear", FEW_DRAWS).drawn
    assert counted is not None
    assert not counted.along["rows"].startswith("0 .. 0")


def test_cases_that_differ_in_memory_alone_are_drawn_both() -> None:
    from hypothesis import strategies as st

    case = OpCase("linear", LinearSpec(8, 8, 1, torch.float32, CPU), (1,), (1,), stress=Stress())
    two = Scene((case,)), Scene((case.but(layout=Layout(spare=3)),))
    assert two[0].label == two[1].label
    search = Search(st.sampled_from(two), lambda scene: "")
    for number in range(20):
        search.run(number)
    assert search.judged == 2


# --------------------------------------------------------------------------------------- how it ends


def asked(backend: str = FAULTY, options: tuple[str, ...] = (), **changes: Any) -> Options:
    """Return what a command line asks for, in float32."""
    of_a_run = dict.fromkeys(("minutes", "draws", "xfails", "report", "dump_failure"))
    flags = dict.fromkeys(("quick", "list_only", "verbose"), False)
    rest = {"only": (), "dtypes": ("float32",), "seed": 0, **of_a_run, **flags, **changes}
    return Options(backend, None, options, None, **rest)


def opened(**changes: Any) -> Suite:
    return Suite.opened(asked(**changes), Xfails(), 0.0)


def test_the_command_that_runs_a_case_draws_as_much() -> None:
    words = asked("cpu", minutes=0.5, draws=2_000_001, seed=3).alone
    assert words[-6:] == ["--seed", "3", "--minutes", "0.5", "--draws", "2000001"]


def test_an_expected_failure_with_too_few_draws_is_no_surprise(judge: Run, sound: Any) -> None:
    (result,) = judge(
        sound(), "rms_norm.drawn", drawing=Drawing(3), xfails=Xfails({"rms_norm.drawn": "a bug"})
    )
    assert result.status == "incomplete"


def test_time_is_shared_among_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    suite = opened(minutes=1, only=("rms_norm.drawn", "latent.drawn", "linear.formula"))
    norm, latent = suite.planned[-2:]
    assert suite.share(suite.planned[0]) == 0 < suite.share(norm) < suite.share(latent)
    assert suite.share(norm) + suite.share(latent) == pytest.approx(60 - ENDING)
    suite.ended.add(latent.id)
    assert suite.share(norm) == 60 - ENDING


def test_an_op_that_refuses_what_most_layers_have_gets_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    ops = {"usual": REFERENCE["rms_norm"], "rare": ServesNothing()}
    monkeypatch.setattr("faulty_backend.FaultyBackend.ops", lambda self: ops)
    run = opened(minutes=1, only=("rms_norm.drawn",))
    usual, rare = map(run.share, run.planned)
    assert rare == pytest.approx(usual * suite.UNUSUAL)


@pytest.mark.parametrize(("least", "most", "end"), [(0, 90, 30), (5, 90, 50), (50, 64, 60)])
def test_no_draw_begins_that_would_end_too_late(
    monkeypatch: pytest.MonkeyPatch, least: int, most: int, end: int
) -> None:
    """Draws take 10 seconds each. With fewer than `least`, `most` seconds may be drawn for instead of 35."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    of = Field("rms_norm", torch.float32, CPU)
    search = Search(scenes(of), lambda scene: now.append(now.pop() + 10) or "")  # type: ignore[func-returns-value]
    _search(search, Drawing(seconds=35, most=most, least=least), None)
    assert now == [end]
    assert search.judged == end / 10


def test_a_run_takes_the_time_that_its_imports_took() -> None:
    """A command that began a minute ago has no time left but for a draw of each check."""
    words = ["--backend", "mla_backends.testing:HostBackend", "--dtype", "float32", "--minutes", "1"]
    assert cli.main([*words, "--only", "rms_norm.drawn"], started=time.monotonic() - 60) == Exit.INCOMPLETE


def test_shrinking_takes_no_time_from_draws_of_other_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr("mla.conformance.drawn.hints", lambda *_: [next(clock) for _ in range(1000)][:0])
    monkeypatch.setattr("faulty_backend.FaultyBackend.ops", lambda self: {"mine": Rarely()})
    run = opened(minutes=5, only=("rms_norm.drawn", "latent.drawn"))
    norm, latent = run.planned
    run.start = float(next(clock))
    result = run.carry_out(norm)
    assert result.status == "fail"
    assert result.drawn is not None
    assert result.drawn.seconds < 300 < 1000 < result.seconds
    assert run.share(latent) > 275 - result.drawn.seconds


def test_fixed_checks_leave_time_for_draws_and_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    run, ends = opened(minutes=1), []
    assert 0 < run.until < 10
    for now in (10.0, 20.0):  # noqa: B007  # the clock reads it
        ends.append(run.until)
    assert 10 < ends[0] < 12
    assert ends[1] < 20
    assert opened(draws=3).until == math.inf


def wrong_over_ones(right: Any, *, x: torch.Tensor, out: torch.Tensor, **rest: Any) -> None:
    """Be wrong where `out` held ones."""
    ones = out is not x and out.numel() > 0 and bool((out == 1).all())
    right(x=x, out=out, **rest)
    out += ones


def test_what_depends_on_the_output_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    wrong = mutant("rotate_query", wrong_over_ones)
    monkeypatch.setattr("faulty_backend.FaultyBackend.ops", lambda self: {"mine": wrong})
    words = ["--backend", FAULTY, "--only", "rotate_query.drawn", "--dtype", "float32"]
    assert main([*words, "--draws", "40", "--dump-failure", str(tmp_path)]) == 4
    assert "the first wrong call is kept" in capsys.readouterr().err


KEPT = {
    "empty": ("", ""),
    "damaged": (f"{FORMAT}\n3\nx7\n", "first: ValueError: invalid literal for int()"),
    "old": ("3\n7\n", "first: the suite that wrote it drew other cases"),
    "folder": (None, "first: IsADirectoryError: "),
}


@pytest.mark.parametrize(("text", "reason"), KEPT.values(), ids=KEPT)
def test_kept_numbers_that_cannot_be_used_are_no_fault_of_the_op(
    sound: Any, judge: Run, tmp_path: Path, capsys: Any, text: str | None, reason: str
) -> None:
    file = tmp_path / "drawn" / "rms_norm-mine-float32-.txt"
    file.parent.mkdir()
    if text is None:
        file.mkdir()
    else:
        file.write_text(text)
    result = drawn_into(judge, sound(ops={"mine": REFERENCE["rms_norm"]}), tmp_path)
    assert result.status == "incomplete"
    said = capsys.readouterr().err
    assert reason in said
    assert (str(file) in said) == bool(reason)
    wrong = drawn_into(judge, sound(ops={"mine": Rarely()}), tmp_path, 300)
    assert "rows are wrong" in wrong.failures[0].reason
    assert ("cannot be written" in capsys.readouterr().err) == (text is None)
    assert text is None or re.fullmatch(rf"{FORMAT}\n\d+\n", file.read_text())


def drawn_into(judge: Run, backend: Any, folder: Path, count: int = FEW_DRAWS) -> CheckResult:
    (result,) = judge(backend, "rms_norm.drawn[mine-*]", drawing=Drawing(count, folder=folder))
    return result
