"""`python -m mla.conformance`: the card, the report, the exit codes, and one sentence for every mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from outcome import Outcome

import mla
import mla_backends
from mla.conformance import suite
from mla.conformance.cli import main
from mla.conformance.registry import all_checks
from mla.conformance.report import ConformanceReport

# The CPU, with a fused op that is right, wrong, raises or gets a signal, as `-O fault=...` says.
MODULE = """
import signal
from mla_backends import Availability, FusedOp
from mla_backends.testing import HostBackend

class Doubles(FusedOp):
    contract = "linear/1"

    def __init__(self, fault):
        self.fault, self.calls = fault, 0

    def unsupported_reasons(self, spec):
        return ["it | never serves"] if self.fault == "refuse" else []

    def __call__(self, packed, *, x, bias, out):
        self.calls += 1
        if self.fault.startswith("SIG") and self.calls == 13:
            signal.raise_signal(signal.Signals[self.fault])
        if self.fault == "raise":
            raise RuntimeError("illegal\\nmemory access")
        product = x.float() @ packed.data.float().T
        if self.fault == "outlier" and len(x) and x[:, 0].abs().sum() > 10 * x[:, 1:].abs().sum(0).max():
            product *= 1.1
        out.copy_(product if bias is None else product + bias)
        if self.fault == "nan":
            out.fill_(float("nan"))

class Mine(HostBackend):
    name = "mine"

    @classmethod
    def known_options(cls):
        return ("threads", "fault")

    def probe(self):
        absent = Availability(False, "it is switched off", "switch it on")
        return absent if self.options.get("fault") == "absent" else Availability(True)

    def environment(self):
        if self.options.get("fault") == "environment":
            raise OSError("no library")
        return {"sdk": "4.2"}

    def device_info(self):
        if self.options.get("fault") == "info":
            raise OSError("no library")
        return super().device_info()

    def ops(self):
        return {"doubles": Doubles(self.options.get("fault", ""))}
"""


Conformance = Callable[..., Outcome]


@pytest.fixture
def conformance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Conformance:
    """Return a function that runs the command line on the module above, in a folder of its own."""
    (tmp_path / "mine_for_conformance.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "MIN_DRAWS", 1)

    def run(*words: str, fault: str = "", backend: bool = True) -> Outcome:
        capsys.readouterr()
        chosen = ["--backend", "mine_for_conformance:Mine", "--quick", "--draws", "2"] * backend
        code = main([*chosen, *(["-O", f"fault={fault}"] if fault else []), *words])
        return Outcome(code, *capsys.readouterr())

    return run


def read(data: bytes | None = None) -> ConformanceReport:
    return msgspec.json.decode(data or Path("out.json").read_bytes(), type=ConformanceReport)


PARTS = ("formula", "pack", "outlier", "far_rows", "grid")
LINEAR = (*(word for part in PARTS for word in ("--only", f"linear.{part}")), "--dtype", "float32")


def test_a_right_backend_gets_a_card_and_exit_code_0(conformance: Conformance) -> None:
    done = conformance(*LINEAR, "--report", "out.json")
    assert done.code == 0
    assert done.err == ""
    head, *lines = done.out.splitlines()
    assert head == "# mla conformance: mine_for_conformance:Mine"
    assert "- backend.sdk: 4.2" in lines
    assert any(line.startswith("- torch: ") for line in lines)
    assert any(line.split()[1:6:2] == ["linear.outlier", "doubles", "pass"] for line in lines)
    assert lines[-1].startswith("5 checks: 5 passed, 0 failed, 0 refused, 0 failed as expected, ")


def test_a_report_onto_stdout_has_no_card_behind_it(conformance: Conformance) -> None:
    done = conformance(*LINEAR, "--report", "/dev/stdout")
    assert len(read(done.out.encode()).checks) == 5


def test_the_report_holds_what_the_card_shows(conformance: Conformance) -> None:
    conformance(*LINEAR, "--report", "out.json", fault="outlier")
    report = read()
    assert (report.schema_version, report.interrupted, report.quick) == (3, False, True)
    assert report.argv[:3] == ["python", "-m", "mla.conformance"]
    assert report.argv[-1] == "fault=outlier" or "fault=outlier" in report.argv
    assert report.backend.name == "mine_for_conformance:Mine"
    assert (report.planned, len(report.checks)) == (5, 5)
    (wrong,) = [check for check in report.checks if check.status == "fail"]
    assert (wrong.id, wrong.of, wrong.dtype) == ("linear.outlier[doubles-float32]", "doubles", "float32")
    assert wrong.cases.failed == 2
    assert [case.id for case in wrong.failures] == [f"linear.outlier[doubles-float32]#{n}" for n in (1, 2)]
    assert wrong.failures[1].case == "66 tokens, 256 to 128, outlier"
    assert wrong.failures[1].reason.startswith("out: 66 of 66 rows are wrong")
    assert wrong.error_ratio is not None
    assert wrong.error_ratio > 1
    others = [check for check in report.checks if check is not wrong]
    assert all(check.error_ratio is None or check.error_ratio <= 1 for check in others)


def test_a_wrong_op_is_exit_code_4_and_the_card_says_where(conformance: Conformance) -> None:
    done = conformance(*LINEAR, fault="outlier")
    assert done.code == 4
    assert "## Failed" in done.out
    assert "- `linear.outlier[doubles-float32]`: 2 of 2 cases\n" in done.out
    for number, tokens in enumerate((1, 66), 1):
        case = f"  - `linear.outlier[doubles-float32]#{number}`: {tokens} tokens, 256 to 128, outlier: out: "
        assert f"{case}{tokens} of " in done.out
    assert "4 passed, 1 failed" in done.out
    assert "Traceback" not in done.out + done.err


def test_what_an_op_raises_is_a_finding_in_one_line(conformance: Conformance) -> None:
    done = conformance(*LINEAR, fault="raise")
    assert done.code == 4
    assert "raised RuntimeError: illegal (mine_for_conformance.py:" in done.out
    assert "memory access" not in done.out


def test_refusals_are_listed_once_per_reason_and_are_no_failure(conformance: Conformance) -> None:
    done = conformance("--only", "linear", "--dtype", "float32", "--dtype", "bfloat16", fault="refuse")
    assert done.code == 0
    assert "## Refused\n\n- `doubles`: it \\| never serves: linear.* [bfloat16, float32]\n" in done.out
    table = done.out.partition("\n\n")[2].partition("\n\n")[2].partition("\n\n")[0].splitlines()
    assert all(line.count("|") in (7, 8) for line in table), table


def test_nothing_but_refusals_is_exit_code_5(conformance: Conformance) -> None:
    done = conformance("--only", "linear.outlier[doubles-*]", fault="refuse")
    assert done.code == 5


def test_an_expected_failure_is_none(conformance: Conformance, tmp_path: Path) -> None:
    (tmp_path / "known.txt").write_text(
        "# SDK 4.2\n\nlinear.outlier[doubles-float32]: it needs SDK 4.3\nlatent.tiles: no such op here\n"
    )
    done = conformance(*LINEAR, "--xfails", "known.txt", "--report", "out.json", fault="outlier")
    assert done.code == 0
    assert (
        "## Failed as expected\n\n- `linear.outlier[doubles-float32]`: it needs SDK 4.3 (2 of 2" in done.out
    )
    assert "## Expected failures that matched no check\n\n- latent.tiles\n" in done.out
    assert read().unused_xfails == ["latent.tiles"]


@pytest.mark.parametrize(
    ("listed", "fault", "code"),
    [("linear.outlier[doubles-*]: it needs SDK 4.3", "", 1), ("linear.pack: it loses bits", "outlier", 4)],
    ids=["alone", "beside a failure, which counts more"],
)
def test_an_expected_failure_that_passes_is_told(
    conformance: Conformance, tmp_path: Path, listed: str, fault: str, code: int
) -> None:
    (tmp_path / "known.txt").write_text(f"{listed}\n")
    done = conformance(*LINEAR, "--xfails", "known.txt", fault=fault)
    assert done.code == code
    assert re.search(rf"{listed[:10]}.* +\| doubles \| XPASS ", done.out)
    assert "1 passed unexpectedly" in done.out


@pytest.mark.parametrize(("fault", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_keeps_what_was_found(conformance: Conformance, fault: str, code: int) -> None:
    done = conformance(*LINEAR, "--report", "out.json", fault=fault)
    assert done.code == code
    report = read()
    assert report.interrupted
    assert 0 < len(report.checks) < report.planned == 5
    assert f"{len(report.checks)} checks (interrupted, 5 planned): " in done.out


@pytest.mark.parametrize("fault", ["environment", "info"])
def test_a_device_that_cannot_describe_itself_still_gets_a_card(conformance: Conformance, fault: str) -> None:
    done = conformance("--only", f"device.{fault}", fault=fault)
    assert done.code == 4
    assert "unknown" in done.out
    assert f"`device.{fault}`: raised OSError: no library" in done.out


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--only", "latent.tile"], 2, "unknown check 'latent.tile'. Did you mean 'latent.tiles'?"),
        (
            ["--only", "latent.tiles[nobody-*]"],
            2,
            "no check of this backend matches --only latent.tiles[nobody-*]",
        ),
        (
            ["--only", "linear.outlier[double-float32]"],
            2,
            "matches --only linear.outlier[double-float32]. Did you mean 'linear.outlier[doubles-float32]'?",
        ),
        (["--minutes", "nan"], 2, "--minutes nan is not a time, such as 0.5 or 10."),
        (["--minutes", "inf"], 2, "--minutes inf is not a time, such as 0.5 or 10."),
        (["--only", "linear.outlier#1st"], 2, "'linear.outlier#1st': a case is named by its number, as in "),
        (["--only", "#3"], 2, "'#3': a case is named by its number, as in "),
        (["--only", "linear.outlier#0"], 2, "'linear.outlier#0': a case is named by its number, as in "),
        (["--only", "linear.outleir#1"], 2, "unknown check 'linear.outleir'. Did you mean 'linear.outlier'?"),
        (
            ["--only", "linear.outlier#4"],
            2,
            "there is no case 'linear.outlier[doubles-bfloat16]#4': "
            "linear.outlier[doubles-bfloat16] has 2 cases.",
        ),
        (["--only", "device.probe#2"], 2, "device.probe has one case."),
        (["--dtype", "float16"], 2, "does not claim float16; it claims: bfloat16, float32."),
        (["--xfails", "none.txt"], 2, "cannot read 'none.txt': No such file or directory."),
        (["--report", "no/out.json"], 2, "cannot write 'no/out.json': there is no folder 'no'."),
        (["-O", "fault"], 2, "-O takes KEY=VALUE, got 'fault'."),
        (["-O", "colour=red"], 2, "backend 'mine' has no option 'colour'; it knows: threads, fault."),
        (["-O", "fault=absent"], 3, "it is switched off; switch it on"),
    ],
)
def test_every_mistake_is_one_sentence(
    conformance: Conformance, words: list[str], code: int, sentence: str
) -> None:
    done = conformance(*words)
    assert done.code == code
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    assert sentence in done.err


def test_a_report_replaces_no_file_of_the_users_own(conformance: Conformance) -> None:
    Path("mine.json").write_text("mine")
    done = conformance("--report", "mine.json")
    assert done.code == 2
    assert "cannot write 'mine.json': it exists and is not a result file" in done.err
    assert Path("mine.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("latent.tiles\n", "'known.txt' line 1: expected 'check: reason', got 'latent.tiles'."),
        ("\nlatent.tiles:  \n", "'known.txt' line 2: expected 'check: reason', got 'latent.tiles:'."),
        ("latent.tlies: it pads\n", "line 1: unknown check 'latent.tlies'. Did you mean 'latent.tiles'?"),
        (
            "latent.tiles[*]#3: it pads\n",
            "line 1: expected failures are checks, not single cases: list 'latent.tiles[*]'.",
        ),
        ("latent: a\nlatent: b\n", "'known.txt' line 2: 'latent' is listed twice."),
        (b"\xff\xfe", "cannot read 'known.txt': "),
    ],
)
def test_a_list_of_expected_failures_is_checked_line_by_line(
    conformance: Conformance, tmp_path: Path, text: Any, sentence: str
) -> None:
    (tmp_path / "known.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = conformance("--xfails", "known.txt")
    assert done.code == 2
    assert sentence in done.err


def test_a_backend_must_be_named(conformance: Conformance) -> None:
    done = conformance(backend=False)
    assert done.code == 2
    assert "--backend is missing" in done.err


def test_the_list_describes_every_check(conformance: Conformance) -> None:
    done = conformance("--list", backend=False)
    assert done.code == 0
    for check in all_checks():
        assert f"{check.id} ({check.fails})\n  {check.description}\n  Catches {check.catches}.\n" in done.out
    part = conformance("--list", "--only", "latent.tiles", backend=False)
    assert part.out.splitlines()[0] == "latent.tiles (tiles)"
    assert part.out.splitlines()[3:] == ["1 check: 1 tiles"]


def test_verbose_names_a_check_before_it_runs(conformance: Conformance) -> None:
    done = conformance("--only", "device.probe", "-v")
    first, last = done.err.splitlines()
    assert first == "device.probe"
    assert re.fullmatch(r"slowest: device\.probe \d\.\d s", last)


def test_a_fault_of_the_suite_itself_is_no_finding(
    conformance: Conformance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "carry_out", lambda *_: [].index("a fault of our own"))
    done = conformance("--only", "device.probe")
    assert (done.code, done.out) == (3, "")
    assert "a fault of our own" in done.err


def test_an_infinite_error_is_on_the_card(conformance: Conformance) -> None:
    done = conformance(*LINEAR[:2], *LINEAR[-2:], fault="nan")
    (row,) = (line for line in done.out.splitlines() if line.startswith("| linear.formula"))
    assert [cell.strip() for cell in row.split("|")][3:6] == ["FAIL", "4, 4 wrong", "inf"]


def test_without_hypothesis_it_says_so_where_it_draws(
    conformance: Conformance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = conformance("--only", "device.probe")
    assert (done.code, done.out) == (2, "")
    assert "the suite needs hypothesis to draw cases, and it is not installed: `pip install hy" in done.err
    assert conformance("--only", "device.probe", "--draws", "0").code == 0


def test_it_runs_as_a_module_and_survives_a_closed_pipe(tmp_path: Path) -> None:
    folders = {str(Path(str(package.__file__)).parents[1]) for package in (mla, mla_backends)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sorted(folders))}
    command = f"'{sys.executable}' -m mla.conformance --list; echo $? >&2"
    done = subprocess.run(
        f"({command}) | head -1", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "device.probe (contract)\n"
    assert done.stderr == "0\n"


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_host_threads_sleep_while_they_wait(tmp_path: Path, given: dict[str, str], policy: str) -> None:
    """Beside other work the suite takes ten times as long otherwise. OpenMP asks when torch is loaded."""
    (tmp_path / "loads.py").write_text(
        "import builtins, os\n"
        "real = builtins.__import__\n"
        "def load(name, *rest, **more):\n"
        "    if name == 'torch' and not hasattr(builtins, 'said'):\n"
        "        builtins.said = os.environ.get('OMP_WAIT_POLICY')\n"
        "        print('when torch is loaded:', builtins.said)\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = load\n"
        "import runpy\n"
        "runpy.run_module('mla.conformance', run_name='__main__', alter_sys=True)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | given
    command = [sys.executable, "loads.py", "--list", "--only", "linear.outlier"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"when torch is loaded: {policy}\n" in done.stdout + done.stderr
