"""What a command may write over: its own results, what is empty or not there, pipes, and nothing else."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.cli import stored
from mla.bench.run.profile import Trace
from mla.command.files import RESULT, TRACE, check_writable, write_bytes
from mla.errors import ResultError

Bench = Callable[..., Any]
MakeRun = Callable[..., results.Run]

VIRTUAL = ("--backend", "fake-virtual-clock")
MINE = "not yours\n"
# What programs of others begin their files with.
FOREIGN = (
    MINE,
    '{"mine": 1}',
    "file,size\n",
    '{"run_id": "7", "testcase": "t"}',
    "<!doctype html><title>mine</title>",
    '{"schema_version": 1, "argv": []}',
)
REFUSED = "it exists and is not {}; remove it or name another file."


@pytest.fixture
def run(make_run: MakeRun) -> str:
    """Write a result file, and return its name."""
    Path("run.json").write_bytes(results.encode(make_run()))
    return "run.json"


@pytest.mark.parametrize(
    ("words", "name", "kind"),
    [
        ([*VIRTUAL, "-o"], "mine.json", RESULT.name),
        ([*VIRTUAL, "--profile"], "mine.json", TRACE.name),
        ([*VIRTUAL, "--profile"], "mine.json.gz", TRACE.name),
        (["ceilings", *VIRTUAL, "-o"], "mine.json", RESULT.name),
        (["export", "run.json", "-o"], "mine.csv", "a table of results"),
        (["export", "run.json", "--format", "infinimetrics", "-o"], "mine.json", "a document of a case"),
        (["report", "run.json", "--html"], "mine.html", "a report"),
    ],
)
@pytest.mark.usefixtures("run")
def test_a_file_of_the_users_own_is_refused_before_anything_runs(
    words: list[str], name: str, kind: str, bench: Bench
) -> None:
    for text in FOREIGN:
        Path(name).write_text(text)
        done = bench(*words, name, fakes=["virtual_clock"])
        assert (done.code, done.error) == (2, f"error: cannot write '{name}': {REFUSED.format(kind)}")
        assert Path(name).read_text() == text
    assert sorted(os.listdir()) == sorted([name, "run.json"])


@pytest.mark.parametrize("before", [None, b"", "result"], ids=["absent", "empty", "result"])
def test_what_is_ours_or_empty_is_replaced(before: bytes | str | None, make_run: MakeRun) -> None:
    path = Path("run.json")
    if before is not None:
        path.write_bytes(results.encode(make_run()) if isinstance(before, str) else before)
        path.chmod(0o640)
    check_writable(path, RESULT)
    write_bytes(b"new", path)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == (0o644 if before is None else 0o640)
    assert os.listdir() == ["run.json"]


@pytest.mark.parametrize("zipped", [False, True])
def test_a_trace_of_ours_is_replaced(zipped: bool) -> None:
    data = Trace().encode()
    Path("trace").write_bytes(gzip.compress(data) if zipped else data)
    check_writable(Path("trace"), TRACE)
    with pytest.raises(ResultError, match="it exists and is not a result file"):
        check_writable(Path("trace"), RESULT)


@pytest.mark.parametrize(
    "words",
    [
        ["export", "run.json", "-o"],
        ["export", "run.json", "--format", "infinimetrics", "-o"],
        ["report", "run.json", "--html"],
    ],
)
@pytest.mark.usefixtures("run")
def test_what_was_exported_before_is_replaced(words: list[str], bench: Bench) -> None:
    assert [bench(*words, "out.json").code for _ in range(2)] == [0, 0]


@pytest.mark.usefixtures("run")
def test_a_result_is_known_and_read_however_large_it_is() -> None:
    with Path("run.json").open("ab") as file:
        file.write(b" " * (65 << 20))
    assert results.read(Path("run.json")).cases
    check_writable(Path("run.json"), RESULT)


def test_a_run_that_is_resumed_from_a_pipe_needs_a_file(run: str, bench: Bench) -> None:
    with subprocess.Popen(["cat", run], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        name = f"/dev/fd/{cat.stdout.fileno()}"
        done = bench(*VIRTUAL, "--resume", name, fakes=["virtual_clock"])
    said = f"error: '{name}' is a pipe and cannot be rewritten: give -o FILE."
    assert (done.code, done.error) == (2, said)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM], ids=["mounted", "another user's, in /tmp"])
def test_what_cannot_be_replaced_changes_in_place(
    number: int, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `docker run -v run.json:/run.json`."""
    kept = Path(run).stat().st_ino

    def refuse(*paths: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    check_writable(Path(run), RESULT)
    write_bytes(b"new", Path(run))
    assert (Path(run).read_bytes(), Path(run).stat().st_ino, os.listdir()) == (b"new", kept, [run])


def test_ctrl_c_after_the_replacement_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def replace_and_interrupt(source: str, target: Path) -> None:
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(b"new", Path("run.json"))
    assert Path("run.json").read_bytes() == b"new"


def test_every_result_in_the_repository_is_ours() -> None:
    folder = Path(__file__).resolve().parents[3] / "benchmarks"
    paths = list(folder.glob("results/*.json"))
    assert paths
    for path in paths:
        check_writable(path, RESULT)


@pytest.mark.parametrize("there", [True, False], ids=["to a result", "to nothing yet"])
def test_a_link_is_written_through(there: bool, run: str) -> None:
    Path("folder").mkdir()
    if there:
        Path(run).rename("folder/real.json")
    Path("link.json").symlink_to("folder/real.json")
    check_writable(Path("link.json"), RESULT)
    write_bytes(b"new", Path("link.json"))
    assert Path("link.json").is_symlink()
    assert Path("folder/real.json").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("gone/run.json"), "there is no folder '"),
        (lambda path: path.symlink_to("."), "it is a folder"),
        (os.mkfifo, "it is a pipe that no process reads from"),
        (lambda path: path.symlink_to("/dev/zero"), "it is neither a file nor a pipe"),
        (lambda path: path.touch(0o444), "it is write-protected"),
    ],
    ids=["loop", "dangling", "folder", "pipe", "device", "read-only"],
)
def test_what_cannot_be_written_is_one_sentence(make: Callable[[Path], None], reason: str) -> None:
    make(Path("run.json"))
    with pytest.raises(ResultError, match=rf"^cannot write 'run\.json': {reason}.*\.$"):
        check_writable(Path("run.json"), RESULT)


def test_a_run_into_a_pipe_writes_one_document(bench: Bench, small: list[str]) -> None:
    """Its reader has begun before the run, and two scenarios end before it gets anything."""
    os.mkfifo("pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(Path("pipe").read_bytes()))
    reader.start()
    while not got and bench(*VIRTUAL, *small, "-o", "pipe", fakes=["virtual_clock"]).code == 2:
        pass  # the thread has not opened it yet
    reader.join(60)
    assert len(results.decode(got[0]).cases) == 2
    assert Path("pipe").is_fifo()


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/dev/null"])
def test_stdout_stays_what_it_is(name: str, run: str, process: Bench) -> None:
    kept = Path(name).lstat().st_ino
    done = process("export", run, "--format", "infinimetrics", "-o", name)
    assert done.code == 0
    assert Path(name).lstat().st_ino == kept
    if name != os.devnull:
        assert json.loads(done.out)["testcase"]
    assert "exported 1 document" in done.err


def test_a_stdout_without_a_descriptor_is_written_to(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook."""
    shown = io.StringIO()
    monkeypatch.setattr("sys.stdout", shown)
    check_writable(Path("/dev/stdout"))
    write_bytes(b"new", Path("/dev/stdout"))
    assert shown.getvalue() == "new"


def test_a_run_onto_stdout_is_read_by_the_next_command(process: Bench, small: list[str]) -> None:
    """There is no table to be divided from it."""
    made = process(*VIRTUAL, *small, "-o", "/dev/stdout", fakes=["virtual_clock"])
    text = made.out
    assert len(results.decode(text.encode()).cases) == 2
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
        assert cat.stdin is not None
        assert cat.stdout is not None
        cat.stdin.write(text.encode())
        cat.stdin.close()
        assert "Decode Throughput" in stored.stored(Path(f"/dev/fd/{cat.stdout.fileno()}"), "table")
