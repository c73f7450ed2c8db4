"""The walk: every end of a step has its verdict, none stops the others, and what is done is kept."""

from __future__ import annotations

import json
import shutil
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import campaign, child
from benchmarks.gpu.loop import Campaign
from benchmarks.gpu.record import FILE, Ledger, opened
from benchmarks.gpu.steps import Machine, Section, Step
from mla.errors import ResultError

CARD = Machine("cpu", "Card 1", True)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STORED = RESULTS / "cpu-epyc-zen4-avx512-bf16-2vcpu-deepseek-v2-lite.json"


def python(name: str, code: str, limit: int = 60, **more: Any) -> Step:
    return Step(name, ("-c", code), limit, **more)


def ends(name: str, code: int, said: str = "error: it says why.", **more: Any) -> Step:
    return python(name, f"import sys; print({said!r}, file=sys.stderr); sys.exit({code})", **more)


def counts(name: str, folder: Path, code: int = 0) -> Step:
    """Leave a mark every time it runs."""
    return python(name, f"open({str(folder / name)!r}, 'a').write('x'); raise SystemExit({code})")


def runs_of(folder: Path, name: str) -> int:
    return len((folder / name).read_text())


def walk(folder: Path, *steps: Step, machine: Machine = CARD, **more: Any) -> Ledger:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    ledger = opened(out, machine, False)
    Campaign(machine, out, ledger, **more).walk([Section("one", "One", steps)])
    return ledger


@pytest.mark.parametrize(
    ("step", "verdict", "reason", "failed"),
    [
        (python("step", "print('first'); print('fine')"), "ok", "fine", False),
        (python("step", "print('a: 1\\nb: 2')", says="^a"), "ok", "a: 1", False),
        (ends("step", 4), "wrong", "it says why.", True),
        (ends("step", 4, tolerates=frozenset({"refused"})), "wrong", "it says why.", True),
        (ends("step", 6), "doubtful", "it says why.", True),
        (ends("step", 2), "refused", "it says why.", True),
        (ends("step", 3), "refused", "it says why.", True),
        (ends("step", 5), "refused", "it says why.", True),
        (ends("step", 3, tolerates=frozenset({"refused"})), "refused", "it says why.", False),
        (ends("step", 1), "crashed", "exit code 1: error: it says why.", True),
        (python("step", "import os; os.abort()"), "crashed", "ended by SIGABRT", True),
        (python("step", "import time; time.sleep(60)", 1), "timed out", "it was ended at its limit", True),
        (python("step", "print('{}')", kind="question"), "ok", "it printed no answer", False),
        (
            python("step", """print('noise'); print('{"question": "?", "answer": "42"}')""", kind="question"),
            "ok",
            "42",
            False,
        ),
    ],
)  # fmt: skip
def test_every_end_has_its_verdict(
    tmp_path: Path, step: Step, verdict: str, reason: str, failed: bool
) -> None:
    ledger = walk(tmp_path, step, python("after", "print('still')"))
    found, after = ledger.records
    assert (found.verdict, found.failed) == (verdict, failed)
    assert found.reason.startswith(reason)
    assert (after.verdict, after.reason) == ("ok", "still")
    assert json.loads((tmp_path / "out" / FILE).read_bytes())["records"][0]["verdict"] == verdict


def test_a_step_that_will_not_end_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "GRACE", 0.3)
    mark = tmp_path / "pid"
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); import time; "
    start = f"subprocess.Popen([sys.executable, '-c', {deaf + 'time.sleep(60)'!r}])"
    parent = f"{deaf}import subprocess, sys; p = {start}; "
    stuck = python("stuck", f"{parent}open({str(mark)!r}, 'w').write(str(p.pid)); time.sleep(60)", 2)
    (found,) = walk(tmp_path, stuck).records
    assert found.verdict == "timed out"
    assert found.seconds < 30
    assert not _alive(int(mark.read_text()))


def test_what_a_step_leaves_running_is_ended(tmp_path: Path) -> None:
    """Such as the workers of a compiler, which would disturb the next step's timing."""
    mark = tmp_path / "pid"
    start = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    left = python("left", f"import subprocess, sys; open({str(mark)!r}, 'w').write(str({start}.pid))")
    (found,) = walk(tmp_path, left).records
    assert found.verdict == "ok"
    assert not _alive(int(mark.read_text()))


def _alive(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


def test_a_second_campaign_keeps_results_and_tries_the_rest_again(tmp_path: Path) -> None:
    steps = [counts(f"code{code}", tmp_path, code) for code in (0, 4, 3, 1)]
    walk(tmp_path, *steps)
    again = walk(tmp_path, *steps)
    assert [runs_of(tmp_path, step.name) for step in steps] == [1, 1, 2, 2]
    assert [(one.verdict, one.kept) for one in again.records] == [
        ("ok", True), ("wrong", True), ("refused", False), ("crashed", False),
    ]  # fmt: skip


def test_a_crash_that_was_looked_for_is_an_answer(tmp_path: Path) -> None:
    step = python("edge", "import os; os.abort()", tolerates=frozenset({"crashed"}))
    (first,) = walk(tmp_path, step).records
    assert (first.verdict, first.failed, first.final) == ("crashed", False, True)


def test_again_drops_what_is_there(tmp_path: Path) -> None:
    step = counts("step", tmp_path)
    walk(tmp_path, step)
    out = tmp_path / "out"
    (out / "one" / "old.json").write_text("{}")
    section = Section("one", "One", (step,))
    assert campaign.carry_out(CARD, [section], [section], [section], out, False, None) == 0
    assert runs_of(tmp_path, "step") == 2
    assert not (out / "one" / "old.json").exists()


def test_a_run_that_its_budget_cut_is_resumed(tmp_path: Path) -> None:
    """The first time the stand-in says that its budget cut something; it notes the words it was given."""
    code = (
        f"import shutil, sys; open({str(tmp_path / 'words')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n'); "
        "shutil.copyfile(sys.argv[1], sys.argv[-1]); "
        "print('--budget skipped 1 of 2' * (sys.argv[-2] == '-o'), file=sys.stderr)"
    )
    step = Step("run", ("-c", code, str(STORED)), 100, "run")
    (first,) = walk(tmp_path, step).records
    assert (first.verdict, first.final) == ("ok", False)
    assert first.reason == "8 ok; the rest did not fit into 100 s"
    (second,) = walk(tmp_path, step).records
    assert (second.verdict, second.final, second.reason) == ("ok", True, "8 ok")
    (third,) = walk(tmp_path, step).records
    assert third.kept
    result = str(tmp_path / "out" / "one" / "cpu-card-1-run.json")
    lines = (tmp_path / "words").read_text().splitlines()
    assert [line.split()[1:] for line in lines] == [
        ["--budget", "90s", "-o", result], ["--budget", "90s", "--resume", result],
    ]  # fmt: skip


def test_a_sweep_is_told_its_time_and_goes_on_with_its_own_file(tmp_path: Path) -> None:
    code = (
        "import sys; file = open(sys.argv[1], 'a+'); file.write('x'); file.seek(0); found = file.read(); "
        "print(found, *sys.argv[2:]); print('--budget skipped 3' * (found == 'x'), file=sys.stderr)"
    )
    step = Step("sweep", ("-c", code, "{out}"), 100, "sweep")
    then = Step("then", ("-c", "print('read')"), 10, "file", file="tuning.json", always=True)
    first, _ = walk(tmp_path, step, then).records
    assert (first.verdict, first.final) == ("ok", False)
    assert first.reason == "x --budget 90s; the rest did not fit into 100 s"
    second, after = walk(tmp_path, step, then).records
    assert (second.final, second.reason) == (True, "xx --budget 90s")
    third, after = walk(tmp_path, step, then).records
    assert (third.kept, after.kept, after.reason) == (True, False, "read")


def test_an_op_that_raises_is_no_missing_library(tmp_path: Path) -> None:
    """Both are exit code 3 of the runner, but only a run that began has left its file."""
    code = "import shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[-1]); sys.exit(3)"
    step = Step("run", ("-c", code, str(STORED)), 100, "run", tolerates=frozenset({"refused"}))
    (found,) = walk(tmp_path, step).records
    assert (found.verdict, found.failed) == ("crashed", True)


def test_tiny_sizes_miss_no_time_that_is_withheld(tmp_path: Path) -> None:
    section = Section("one", "One", (ends("step", 6),))
    for smoke in (True, False):
        folder = tmp_path / str(smoke)
        folder.mkdir()
        ledger = opened(folder, CARD, smoke)
        Campaign(CARD, folder, ledger).walk([section])
        assert [(one.verdict, one.failed) for one in ledger.records] == [("doubtful", not smoke)]


def test_a_step_that_the_budget_ended_is_no_failure_and_gets_its_own_limit_the_next_time(
    tmp_path: Path,
) -> None:
    step = python("step", "import time; time.sleep(1.5)")
    now = iter([0.0, 0.0, 59.0])
    (first,) = walk(tmp_path, step, budget=60.0, clock=lambda: next(now)).records
    assert (first.verdict, first.limit, first.failed, first.final) == ("timed out", 1, False, False)
    assert first.reason.endswith("; the rest did not fit into 1 s")
    (second,) = walk(tmp_path, step).records
    assert (second.verdict, second.limit, second.final) == ("ok", 60, True)
    (own,) = walk(tmp_path, python("own", "import time; time.sleep(9)", 1)).records[1:]
    assert (own.verdict, own.failed, own.reason) == ("timed out", True, "it was ended at its limit")


def test_a_budget_trims_and_then_skips(tmp_path: Path) -> None:
    now = iter([0.0, 10.0, 10.0, 96.0])
    steps = [python("first", "print('fine')", 300), counts("second", tmp_path)]
    first, second = walk(tmp_path, *steps, budget=100.0, clock=lambda: next(now)).records
    assert (first.verdict, first.limit) == ("ok", 90)
    assert (second.verdict, second.reason, second.failed) == ("skipped", "the budget is used up", False)
    assert not (tmp_path / "second").exists()


def test_sections_that_cannot_say_anything_are_skipped_with_the_reason(tmp_path: Path) -> None:
    broken = Machine("acme", reason="no driver")
    out = tmp_path / "out"
    out.mkdir()
    step = counts("step", tmp_path)
    ledger = opened(out, broken, False)
    others = Section("others", "Others", (step,), frozenset({"nvidia"}))
    hosts = Section("host", "Host", (python("host", "print('here')"),), needs_device=False)
    Campaign(broken, out, ledger).walk([Section("one", "One", (step,)), others, hosts])
    assert [(one.verdict, one.reason) for one in ledger.records] == [
        ("skipped", "the backend is not usable: no driver"),
        ("skipped", "it is about nvidia only"),
        ("ok", "here"),
    ]
    assert not (tmp_path / "step").exists()


def test_ctrl_c_keeps_what_is_done_and_leaves_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    press = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    steps = (counts("first", tmp_path), python("pressed", press), counts("third", tmp_path))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
    try:
        plan = [Section("one", "One", steps)]
        code = campaign.carry_out(CARD, plan, plan, [], tmp_path / "out", False, None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert not (tmp_path / "third").exists()
    said = capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text()
    for text in (said, table):
        assert "first" in text
        assert "interrupted" in text
    assert "\n2 steps are left: one pressed, one third\n" in table
    stored = json.loads((tmp_path / "out" / FILE).read_bytes())["records"]
    assert [one["verdict"] for one in stored] == ["ok", "interrupted"]
    later = walk(tmp_path, steps[0], python("pressed", "print('now')"), steps[2])
    assert [one.verdict for one in later.records] == ["ok", "ok", "ok"]
    assert runs_of(tmp_path, "first") == 1


def test_results_are_packed_even_if_there_is_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign.tables.Report, "markdown", lambda report: 1 / 0)
    plan, home = [Section("one", "One", (counts("step", tmp_path),))], tmp_path / "home"
    with pytest.raises(OSError, match=r"table\.md"):
        campaign.carry_out(CARD, plan, plan, [], tmp_path / "out", False, None, home)
    with tarfile.open(home / "out.tgz") as archive:
        assert f"out/{FILE}" in archive.getnames()
    assert [path.name for path in home.iterdir()] == ["out.tgz"]


@pytest.mark.parametrize(("codes", "expected"), [([0], 0), ([0, 3], 3), ([3, 4, 1], 4), ([1], 3)], ids=str)
def test_the_exit_code_names_the_worst(tmp_path: Path, codes: list[int], expected: int) -> None:
    steps = tuple(ends(f"step{number}", code) for number, code in enumerate(codes))
    section = Section("one", "One", steps)
    assert campaign.carry_out(CARD, [section], [section], [], tmp_path / "out", False, None) == expected


def test_what_is_left_is_what_has_not_come_to_an_end(tmp_path: Path) -> None:
    """A failure has; what was skipped, cut or never asked for has not."""
    run = ("-c", "import sys; print('--budget skipped 3', file=sys.stderr)")
    cut, failed, slow = Step("cut", run, 10, "sweep"), ends("failed", 3), python("slow", "", 1)
    others = Section("others", "Others", (slow,), frozenset({"acme"}))
    plan = [Section("one", "One", (cut, failed)), Section("two", "Two", (slow,)), others]
    (tmp_path / "out").mkdir()
    ledger = opened(tmp_path / "out", CARD, False)
    assert ledger.left(plan) == ["one cut", "one failed", "two slow"]
    Campaign(CARD, tmp_path / "out", ledger).walk(plan[:1])
    assert ledger.left(plan) == ["one cut", "two slow"]
    Campaign(CARD, tmp_path / "out", ledger, budget=0.0).walk(plan[1:])
    assert opened(tmp_path / "out", CARD, False).left(plan) == ["one cut", "two slow"]
    Campaign(CARD, tmp_path / "out", ledger).walk(plan)
    assert ledger.left(plan) == ["one cut"]


@pytest.mark.parametrize("other", [Machine("cpu", "Card 2", True), Machine("gpu", "Card 1", True)])
def test_a_folder_of_another_card_is_refused(tmp_path: Path, other: Machine) -> None:
    walk(tmp_path, python("step", ""))
    with pytest.raises(ResultError, match=r"holds another campaign: .* was .* and is"):
        opened(tmp_path / "out", other, False)
    (tmp_path / "out" / FILE).write_text("{")
    with pytest.raises(ResultError, match="cannot go on with"):
        opened(tmp_path / "out", CARD, False)


def test_a_folder_that_lost_its_results_runs_again(tmp_path: Path) -> None:
    step = counts("step", tmp_path)
    walk(tmp_path, step)
    shutil.rmtree(tmp_path / "out")
    walk(tmp_path, step)
    assert runs_of(tmp_path, "step") == 2
