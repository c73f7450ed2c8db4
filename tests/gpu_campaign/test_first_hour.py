"""The first hour as commands: it survives every step, says what is left, and another machine goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mla.bench import results

HERE = Path(__file__).parents[2] / "benchmarks" / "gpu"
ROOT = HERE.parents[1]
SOURCES = f"""eval "$(sed -n '/^brought=(/,/^}}/p' {HERE}/first_hour.sh)"; sources"""  # its own function
# Stands in for PYTHON: does what STUB says, but for the card's name and the table.
STUB = f"""#!/usr/bin/env bash
case "$*" in
    -c*) echo "${{READS:-}} $CARD" ;;
    *table.py*) exec "{sys.executable}" "$@" ;;
    *) eval "$STUB" ;;
esac
"""


def environment(work: Path) -> dict[str, str]:
    cpu = {"BACKEND": "cpu", "SMOKE": "1", "OMP_NUM_THREADS": "1", "INSTALLED": "1"}
    return {**os.environ, **cpu, "WORK": str(work), "OUT": str(work / "out"), "PYTHON": sys.executable}


def sources(checkout: Path) -> bytes:
    return subprocess.run(["bash", "-c", SOURCES], cwd=checkout, capture_output=True, check=True).stdout


def run(work: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(HERE / "first_hour.sh"), *words], cwd=work.parent, env=environment(work) | variables,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """Return the variables with which a stub carries out the steps."""
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)
    return {"PYTHON": str(tmp_path / "stub"), "CARD": "Card A", "SMOKE": ""}


def steps(work: Path) -> dict[str, list[str]]:
    """Return name -> verdict, state and code of what was carried out."""
    lines = [line.split("\t") for line in (work / "results" / "steps.tsv").read_text().splitlines()]
    return {line[0]: line[1:4] for line in lines}


def runs(pid: Path) -> bool:
    """Return whether a process whose number a file holds is still there."""
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    return state.exists() and state.read_text().rpartition(") ")[2][0] != "Z"


def test_a_real_step_leaves_its_result_and_a_second_command_keeps_it(tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = run(work, "grid-4")
    assert done.returncode == 0, done.stderr
    assert steps(work) == {"grid-4": ["ok", "done", "0"]}
    assert [case.check.status for case in results.read(work / "results" / "grid-4.json").cases] == ["ok"] * 2
    assert "latent_attention batch=2 kv=64 heads=4" in (work / "out" / "table.md").read_text()
    again = run(work, "grid-4")
    assert again.returncode == 0
    assert "grid-4: kept" in again.stderr


def test_no_end_of_a_step_ends_the_others(tmp_path: Path, stub: dict[str, str]) -> None:
    work = tmp_path / "work"
    ends = """case "$*" in
        *tune.py\\ compile*) kill -SEGV $$ ;;
        *ops.preflight*) echo 'error: no library' >&2; exit 3 ;;
        *ceilings*) echo noise; echo 'error: the device is gone' >&2; exit 3 ;;
        *--heads\\ 16*) exit 4 ;;
        *--heads\\ 128*) echo '--budget cut short 2 cases' >&2 ;;
        *own*) echo {} >"${@: -1}"; exit 3 ;;
        *latent\\ --report*) exit 6 ;;
        *) echo fine ;;
    esac"""
    done = run(work, **stub, STUB=ends.replace("\\\\", "\\"))
    assert done.returncode == 4, done.stderr
    ended = steps(work)
    assert ended["compile-tiles"] == ["crashed", "failed", "139"]
    assert ended["compile-ops"] == ["refused", "open", "3"]
    assert ended["facts"] == ["refused", "failed", "3"]
    assert ended["rivals-16-32x64k"] == ["wrong", "done", "4"]
    assert ended["rivals-128-32x64k"] == ["ok", "cut", "0"]
    assert ended["conformance-latent"] == ["doubtful", "failed", "6"]
    assert ended["profile"] == ["ok", "done", "0"]
    text = (work / "out" / "table.md").read_text()
    assert "| facts | refused | 3 |" in text
    assert "the device is gone |" in text
    assert "2 steps are left: rivals-128-32x64k, rivals-128-32x64k-tuned\n" in done.stderr
    wrong = run(work, "rivals-16-*64k", **stub, STUB="echo fine")
    assert wrong.returncode == 4, "a wrong result that is kept is still wrong"
    assert "rivals-16-32x64k: kept" in wrong.stderr
    second = run(work, "facts", "profile", **stub, STUB="echo fine")
    assert second.returncode == 0, second.stderr
    assert "facts: ok" in second.stderr, "what failed is tried again"
    assert "profile: kept" in second.stderr
    third = run(work, "facts", "profile", **stub, STUB="echo fine", AGAIN="prof*")
    assert "profile: ok" in third.stderr
    assert "facts: kept" in third.stderr


@pytest.mark.parametrize(("reads", "words"), [("tuning", " -O tuning=results/tuning/a.json"), ("", "")])
def test_a_tuning_that_was_found_is_used_where_the_backend_takes_it(
    reads: str, words: str, tmp_path: Path, stub: dict[str, str]
) -> None:
    work = tmp_path / "work"
    (work / "results" / "tuning").mkdir(parents=True)
    (work / "results" / "tuning" / "a.json").write_text("{}")
    done = run(work, "own-deepseek-r1", "profile", **stub, READS=reads, STUB='echo "$*"')
    assert done.returncode == 0, done.stderr
    said = {name: (work / "results" / f"{name}.out").read_text() for name in ("own-deepseek-r1", "profile")}
    assert f"{words} --budget 135s -o results/own-deepseek-r1.json\n" in said["own-deepseek-r1"]
    assert "tuning=" not in said["profile"]
    assert ("tuning=" in said["own-deepseek-r1"]) == bool(words)


def test_a_step_goes_on_with_its_result_unless_the_tuning_is_another(
    tmp_path: Path, stub: dict[str, str]
) -> None:
    work, tuning = tmp_path / "work", tmp_path / "work" / "results" / "tuning" / "a.json"
    cut = "echo {} >${@: -1}; echo '--budget skipped 2 cases' >&2; echo $*"
    for text, option in (("", "-o"), ("", "--resume"), ("{1}", "-o"), ("{1}", "--resume"), ("{2}", "-o")):
        if text:
            tuning.parent.mkdir(exist_ok=True)
            tuning.write_text(text)
        done = run(work, "own-deepseek-r1", **stub, READS="tuning", STUB=cut)
        assert done.returncode == 0, done.stderr
        said = (work / "results" / "own-deepseek-r1.out").read_text()
        assert said.endswith(f" {option} results/own-deepseek-r1.json\n"), (text, said)


def test_a_step_ends_at_its_limit_with_all_that_it_started(tmp_path: Path, stub: dict[str, str]) -> None:
    work, copy = tmp_path / "work", tmp_path / "benchmarks" / "gpu"
    shutil.copytree(HERE, copy)
    script = copy / "first_hour.sh"
    script.write_text(script.read_text().replace("step facts 120", "step facts 1"))
    (tmp_path / "benchmarks" / "triton").symlink_to(ROOT / "benchmarks" / "triton")
    env = environment(work) | stub | {"STUB": 'sleep 77 & echo $! >"$WORK/pid"; wait'}
    done = subprocess.run([str(script), "facts"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert steps(work)["facts"] == ["timed out", "failed", "124"]
    assert not runs(work / "pid")


def test_a_step_leaves_no_process_behind(tmp_path: Path, stub: dict[str, str]) -> None:
    work = tmp_path / "work"
    done = run(work, "facts", **stub, STUB='trap "" TERM; sleep 77 & echo $! >"$WORK/pid"')
    assert done.returncode == 0, done.stderr
    assert not runs(work / "pid")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_what_is_done_is_brought_home_when_the_command_is_ended(
    number: signal.Signals, code: int, tmp_path: Path, stub: dict[str, str]
) -> None:
    """Only the script gets the signal, as from a machine that ends what it started."""
    work = tmp_path / "work"
    env = environment(work) | stub | {"STUB": "exec sleep 77"}
    command = [str(HERE / "first_hour.sh"), "facts", "profile"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as script:
        assert script.stderr is not None
        said = [next(line for line in script.stderr if "at most" in line)]
        script.send_signal(number)
        said += script.stderr
    assert script.returncode == code, said
    assert steps(work)["facts"][:2] == ["interrupted", "cut"]
    with tarfile.open(work / "out" / "results.tgz") as archive:
        assert "results/steps.tsv" in archive.getnames()
    assert "interrupted" in (work / "out" / "table.md").read_text()
    assert any(" steps are left: " in line and "facts" in line and "profile" in line for line in said)
    assert f"what is to be taken away is in {work}/out\n" in said


def test_without_a_table_the_exit_code_and_the_archive_stay(tmp_path: Path, stub: dict[str, str]) -> None:
    (tmp_path / "stub").write_text(STUB.replace("exec ", "exit 1; "))
    done = run(tmp_path / "work", "facts", **stub, STUB="exit 4")
    assert done.returncode == 4, done.stderr
    assert {path.name for path in (tmp_path / "work" / "out").iterdir()} == {"results.tgz"}
    assert "table.py failed; the results are in the archive\n" in done.stderr
    assert "cannot stat" not in done.stderr


def test_another_machine_of_that_kind_goes_on_and_others_are_refused(
    tmp_path: Path, stub: dict[str, str]
) -> None:
    work = tmp_path / "work"
    assert run(work, "compile-ops", "facts", **stub, STUB="echo fine").returncode == 0
    assert {path.name for path in (work / "out").iterdir()} == {"results.tgz", "table.md"}
    shutil.rmtree(work / "results")
    (work / "out" / "results.tgz").rename(work / "results.tgz")
    second = run(work, "compile-ops", "facts", **stub, STUB="echo fine")
    assert second.returncode == 0, second.stderr
    assert "facts: kept" in second.stderr
    assert "compile-ops: ok" in second.stderr, "caches are not in the archive"
    other = run(work, "facts", **stub | {"CARD": "Card B"})
    assert other.returncode == 2
    assert other.stderr == f"error: {work}/results are of cpu, Card A; this is cpu, Card B: set WORK.\n"


def test_a_backend_that_is_not_usable_is_said_before_any_step(tmp_path: Path) -> None:
    done = run(tmp_path / "work", "facts", BACKEND="metax")
    assert done.returncode == 3
    assert done.stderr.startswith("error: backend 'metax' is not usable here: backend 'metax' ")


def test_a_backend_that_nobody_knows_is_wrong_usage(tmp_path: Path) -> None:
    done = run(tmp_path / "work", "facts", BACKEND="nvdia")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown backend 'nvdia' (did you mean 'nvidia'?); ")


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("exit 124", "it did not answer within 120 s"),
        ("kill -SEGV $$", "exit code 139"),
        ("echo; echo RuntimeError: none >&2; exit 1", "RuntimeError: none"),
    ],
)
def test_a_backend_that_ends_without_a_sentence_is_described(
    end: str, said: str, tmp_path: Path, stub: dict[str, str]
) -> None:
    (tmp_path / "stub").write_text(STUB.replace("    -c*)", f"    -c*) {end} ;;\n    -c*)"))
    done = run(tmp_path / "work", "facts", **stub)
    assert done.returncode == 3
    assert done.stderr == f"error: backend 'cpu' is not usable here: {said}\n"


@pytest.mark.parametrize("limit", ["150", "-600", "ten", "0600"])
def test_a_limit_without_room_for_a_step_is_refused(tmp_path: Path, limit: str) -> None:
    done = run(tmp_path, "facts", LIMIT=limit)
    assert done.returncode == 2
    assert done.stderr == f"error: LIMIT must be 240 to 99999 seconds, got '{limit}'.\n"


def test_wheels_are_known_by_all_that_goes_into_them(tmp_path: Path) -> None:
    files = [
        "mla/bench/workload/standard.toml", "backends/mla_backends/py.typed", "plugins/nvidia/pyproject.toml",
        "plugins/nvidia/mla_backend_nvidia/tuning/card.json", "backends/pyproject.toml", "pyproject.toml",
    ]  # fmt: skip
    sums = set()
    for change in ["", *files]:
        for name in files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"changed: {name == change}")
        sums.add(sources(tmp_path))
    assert len(sums) == 1 + len(files)
    (tmp_path / "mla" / "__pycache__").mkdir()
    (tmp_path / "mla" / "__pycache__" / "x.pyc").write_text("x")
    assert sources(tmp_path) in sums
    (tmp_path / files[0]).rename(tmp_path / "mla" / "other.toml")
    assert sources(tmp_path) not in sums


def test_wheels_of_another_checkout_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "sources").write_text("another\n")
    said = f"error: {tmp_path}/wheels is not of this checkout: run 'first_hour.sh pack'.\n"
    done = run(tmp_path, "facts", INSTALLED="")
    assert (done.returncode, done.stderr) == (2, said)
    shutil.rmtree(tmp_path / "wheels")
    assert run(tmp_path, INSTALLED="").returncode == 2


def test_help_and_wrong_words(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert "first_hour.sh pack" in done.stdout
    for word, said in (("--lst", "there is no option '--lst'"), ("fatcs", "there is no step 'fatcs'")):
        wrong = run(tmp_path, word)
        assert wrong.returncode == 2
        assert said in wrong.stderr
    again = run(tmp_path, "facts", AGAIN="facts fatcs")
    assert (again.returncode, again.stderr) == (2, "error: AGAIN: this command has no step 'fatcs'.\n")


@pytest.mark.parametrize("word", ["pack", "--dry-run"])
def test_packing_that_fails_is_no_success(word: str, tmp_path: Path, stub: dict[str, str]) -> None:
    done = run(tmp_path / "work", word, **stub, STUB="echo no network >&2; exit 1")
    assert done.returncode != 0, done.stderr
    assert "no network" in done.stderr
    assert "MiB" not in done.stdout
