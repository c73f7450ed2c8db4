"""What only a process can show: pipes, signals, encodings, and a Python without torch."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results

Bench = Callable[..., Any]
Start = Callable[..., "subprocess.Popen[str]"]

VIRTUAL = ("--backend", "fake-virtual-clock")
QUICK = str(Path(__file__).resolve().parents[2] / "support" / "quick")  # limits in no time
# A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and children inherit that.
LAUNCH = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "runpy.run_module('mla.bench', run_name='__main__', alter_sys=True)"
)


class Child(subprocess.Popen[str]):
    """A process that does not outlive its test, which waits for it after a failure, too."""

    def __exit__(self, *failure: Any) -> None:
        if failure[0]:
            self.kill()
        super().__exit__(*failure)


# A second Ctrl-C, while the result takes the place of the file.
AGAIN = (
    "import os, sys; sys.addaudithook(lambda event, values: event == 'os.rename' "
    "and str(values[1]).endswith('run.json') and os.kill(os.getpid(), 2)); "
)
FULL = "error: cannot write the result to stdout: No space left on device"


def read(path: str) -> results.Run:
    return results.decode(Path(path).read_bytes())


@pytest.fixture
def start(install: Callable[[str], Path], small: list[str]) -> Start:
    """Return a function that starts a run on the virtual clock and hands over the running process."""

    def start(*words: str, before: str = "", **pipes: Any) -> subprocess.Popen[str]:
        folders = [str(install("virtual_clock")), QUICK, os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(filter(None, folders))
        # As in a user's shell: an unbuffered stream leaves nothing for the end of the process.
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        return Child(
            [sys.executable, "-c", before + LAUNCH, *VIRTUAL, *small, *words],
            env={**buffered, "PYTHONPATH": path},
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes},
        )

    return start


@pytest.mark.parametrize("again", ["", AGAIN], ids=["once", "and while the result is written"])
def test_ctrl_c_keeps_the_complete_passes(start: Start, again: str) -> None:
    """A pass of 4 forwards waits 5 times: the 12th is in the third pass."""
    words = ("-O", "interrupt=12", "--warmups", "0", "--scenario", "decode", "-o", "run.json")
    with start(*words, before=again) as child:
        out, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted: the result holds what was measured until then"
    (case,) = read("run.json").cases
    assert case.interrupted
    assert case.passes == 2
    assert case.latency_ms is not None
    assert len(case.latency_ms.samples) == 8
    assert out.splitlines()[-1].startswith("Decode Throughput: ")


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        ([signal.SIGINT], 130, "interrupted"),
        ([signal.SIGTERM], 143, "interrupted by SIGTERM"),
        ([signal.SIGTERM] * 2, 143, "interrupted by SIGTERM"),  # Slurm's, and srun's copy of it
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM twice"],
)
def test_a_signal_from_outside_ends_a_long_run_soon(
    start: Start, sent: list[signal.Signals], code: int, said: str
) -> None:
    options = ["--passes", "100000", "--scenario", "decode", "-O", "announce=1", "-o", "run.json"]
    with start(*options) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line == "timing starts\n":
                break
        for number in sent:
            child.send_signal(number)
        _, err = child.communicate(timeout=120)
    assert child.returncode == code
    assert "Traceback" not in err
    assert err.splitlines()[-1] == f"{said}: the result holds what was measured until then"
    (case,) = read("run.json").cases
    assert case.interrupted
    assert case.passes < 100000
    if case.latency_ms is not None:
        assert len(case.latency_ms.samples) == case.passes * 4


def test_a_terminal_that_is_closed_does_not_cost_the_result(start: Start) -> None:
    """SIGHUP comes, and nothing can be printed any more, by a progress bar neither."""
    ours, its = os.openpty()
    options = ["--passes", "100000", "--scenario", "decode", "-O", "announce=1", "-o", "run.json"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), its)
    control = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
    with start(*options, **pipes, **control) as child:
        os.close(its)
        shown = b""
        while b"timing starts" not in shown:
            shown += os.read(ours, 1 << 16)
        os.close(ours)
        assert child.wait(timeout=120) == 129
    (case,) = read("run.json").cases
    assert case.interrupted


@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_a_full_stream_does_not_cost_the_result(start: Start, full: str) -> None:
    with (
        open("/dev/full", "w") as stream,
        start("--passes", "1", "-o", "run.json", **{full: stream}) as child,
    ):
        out, err = child.communicate(timeout=120)
    if full == "stdout":
        assert (child.returncode, err.splitlines()[-1]) == (2, f"{FULL}; written: 'run.json'.")
    else:
        assert child.returncode == 0
        assert out.splitlines()[-1].startswith("Decode Throughput: ")
    assert len(read("run.json").cases) == 2


def test_a_folder_that_vanishes_during_the_run_does_not_cost_the_numbers(start: Start) -> None:
    Path("out").mkdir()
    options = ["--passes", "200", "--scenario", "decode", "-O", "announce=1", "-o", "out/run.json"]
    with start(*options) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line == "timing starts\n":
                break
        Path("out").rmdir()
        out, err = child.communicate(timeout=120)
    assert child.returncode == 2
    assert out.splitlines()[-1].startswith("Decode Throughput: ")
    assert err.splitlines()[-1] == "error: cannot write 'out/run.json': No such file or directory."


def test_a_name_the_terminal_cannot_show_does_not_cost_the_result(process: Bench, small: list[str]) -> None:
    Path("tiny.toml").write_text(Path("tiny.toml").read_text().replace('"decode"', '"größe"', 1))
    options = ["--passes", "1", "--scenario", "größe", "--format", "csv"]
    done = process(*VIRTUAL, *small, *options, fakes=["virtual_clock"], PYTHONIOENCODING="ascii")
    assert done.code == 0
    assert ",gr??e," in done.out


@pytest.fixture
def no_torch(tmp_path: Path) -> Path:
    """Return a folder in which `torch` is as good as not installed."""
    folder = tmp_path / "no_torch"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    return folder


def test_without_torch_one_sentence_says_how_to_get_it(process: Bench, no_torch: Path) -> None:
    done = process("--backend", "cpu", path=[no_torch])
    assert done.code == 3
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    assert "No module named 'torch'" in done.err
    assert "install torch from PyPI" in done.err


def test_without_torch_help_usage_errors_and_list_still_work(process: Bench, no_torch: Path) -> None:
    assert process("--help", path=[no_torch]).code == 0
    assert process("--version", path=[no_torch]).code == 0
    assert process("--workload", "no.toml", path=[no_torch]).code == 2
    done = process("list", path=[no_torch])
    assert done.code == 0
    assert done.err == ""


def test_an_unpackaged_backend_without_torch_says_so(process: Bench, no_torch: Path, tmp_path: Path) -> None:
    (tmp_path / "loose.py").write_text("import torch\n")
    done = process("--backend", "loose:Loose", path=[no_torch, tmp_path])
    assert done.code == 3
    assert "No module named 'torch'" in done.error
    assert "install the torch build it needs" in done.error


def test_sigterm_while_modules_are_imported_is_told_from_ctrl_c(tmp_path: Path) -> None:
    """Imports run text with `exec`, and an interrupt there makes Python end as after Ctrl-C."""
    # Not by `print`: a signal that comes while it flushes has the next one write the same once more.
    asleep = "import os, time; os.write(2, b'asleep\\n'); time.sleep(60)"
    (tmp_path / "sleepy.py").write_text(f"exec({asleep!r})\n")
    words = ["-m", "mla.bench", "--backend", "sleepy:it", "--list-ops"]
    child = subprocess.Popen([sys.executable, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    assert child.stderr.readline() == "asleep\n"
    child.terminate()
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (143, "error: interrupted by SIGTERM\n")


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "None 10000"), ({"GOMP_SPINCOUNT": "7"}, "None 7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None")],
)
def test_host_threads_do_not_spin_for_long_unless_the_user_says_so(
    process: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], policy: str
) -> None:
    """OpenMP asks when torch is loaded, which ends this run."""
    (tmp_path / "torch.py").write_text(
        "import os\n"
        "policies = [str(os.environ.get(name)) for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')]\n"
        "raise ImportError('threads wait as in ' + ' '.join(policies))\n"
    )
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    done = process("--backend", "cpu", "--list-ops", path=[tmp_path], **given)
    assert f"threads wait as in {policy}" in done.err
