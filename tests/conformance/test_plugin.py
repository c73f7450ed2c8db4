"""The suite on pytest: as anybody calls it, and behind the command, which is deaf to the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import faulty_backend
import pytest
import torch

import mla
import mla_backends
from mla.conformance.cli import main
from mla.conformance.suite import Suite

FAULTY = ("--mla-backend", "faulty_backend:FaultyBackend", "--mla-quick", "--mla-dtype", "float32")
SCALED = (*FAULTY, "--mla-option", "op=linear", "--mla-option", "fault=scale")
EDITABLE = "ignore:Module already imported so cannot be rewritten"  # mla, whose finder is imported first


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a user's pytest in a folder of theirs, where every warning is an error."""
    modules: tuple[Any, ...] = (mla, mla_backends)
    folders = {str(Path(str(package.__file__)).parents[1]) for package in modules}
    folders.add(str(Path(faulty_backend.__file__).parent))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sorted(folders))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-W",
        "error",
        "-W",
        EDITABLE,
        "-p",
        "no:cacheprovider",
        *words,
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


LOADED = """
import sys

def test_what_is_loaded():
    rooms = sorted(name for name in sys.modules if name.partition(".")[0] in ("mla", "mla_backends", "torch"))
    assert rooms == ["mla", "mla.conformance", "mla.conformance.plugin"], rooms
    assert not {"click", "msgspec", "numpy", "rich"} & set(sys.modules)
"""


def test_a_pytest_of_something_else_loads_the_plugin_alone(tmp_path: Path) -> None:
    """It is registered, so every pytest in this environment has it."""
    (entry,) = (point for point in metadata.entry_points(group="pytest11") if point.name == "mla")
    assert entry.value == "mla.conformance.plugin"
    (tmp_path / "test_loaded.py").write_text(LOADED)
    done = run_pytest(tmp_path, "-q")
    assert done.returncode == 0, done.stdout + done.stderr


def test_pytest_selects_stops_and_reports(tmp_path: Path) -> None:
    """With a configuration of the user's."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers --strict-config\n")
    chosen = ("-k", "device.probe or linear.pack or linear.formula", "-x", "--junitxml=out.xml")
    done = run_pytest(tmp_path, "--pyargs", "mla.conformance", *SCALED, *chosen)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "The plainest cases are right.\n" in done.stdout
    assert "`linear.formula[faulty-float32]#3`: 130 tokens, 128 to 256: out: 130 of 130 rows" in done.stdout
    assert "Traceback" not in done.stdout
    cases = list(ElementTree.parse(tmp_path / "out.xml").iter("testcase"))
    names = [str(case.get("name")) for case in cases]
    assert "test_conformance[device.probe]" in names
    assert names[-1] == "test_conformance[linear.formula[faulty-float32]]", "it is the first that fails"
    assert [len(list(case.iter("failure"))) for case in cases] == [0] * (len(cases) - 1) + [1]


def test_pytest_counts_what_was_left_out_for_time(tmp_path: Path) -> None:
    chosen = ("-k", "linear.formula and faulty", "--mla-option", "op=linear", "--mla-minutes", "1e-6")
    done = run_pytest(tmp_path, "--pyargs", "mla.conformance", *FAULTY, *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    said = "3 fixed cases left out as time was up (--mla-minutes gives more)"
    assert said in done.stdout.splitlines()


def test_the_first_wrong_call_is_kept_by_one_process_alone(tmp_path: Path) -> None:
    words = ("--pyargs", "mla.conformance", *SCALED, "--mla-dump-failure", "kept")
    done = run_pytest(tmp_path, *words, "-n1")
    assert done.returncode != 0
    assert "--mla-dump-failure keeps one call: leave out -n, or use -n0." in done.stdout
    assert not (tmp_path / "kept").exists()


def test_a_test_is_named_by_its_id_and_an_expected_failure_that_passes_fails(tmp_path: Path) -> None:
    """Also in another process, whose reports are sent."""
    (tmp_path / "known.txt").write_text(
        "linear.formula[faulty-*]: SDK 4.3 is needed\nlinear.pack: it loses bits\n"
    )
    file = Path(str(mla.__file__)).parent / "conformance" / "test_backend.py"
    ids = ("linear.formula[faulty-float32]", "linear.pack[faulty-float32]", "device.probe")
    named = [f"{file}::test_conformance[{check}]" for check in ids]
    done = run_pytest(tmp_path, *named, *SCALED, "--mla-xfails", "known.txt", "-n1", "-rA")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 1 xfailed" in done.stdout
    assert "linear.formula[faulty-float32]: SDK 4.3 is needed (4 of 4 cases; 1 tokens" in done.stdout
    assert "expected to fail, but passed:\nlinear.pack[faulty-float32]: it loses bits" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "--mla-backend is missing"),
        (("--mla-backend", "nobody"), "unknown backend 'nobody'"),
        ((*FAULTY, "--mla-xfails", "none.txt"), "cannot read 'none.txt': No such file or directory."),
        ((*FAULTY, "--mla-dtype", "float64"), "unknown dtype 'float64'."),
        ((*FAULTY, "--mla-minutes=0"), "--mla-minutes takes a number that is above 0."),
        ((*FAULTY, "--mla-draws=-1"), "--mla-draws takes a number that is 0 or more."),
    ],
)
def test_a_mistake_is_one_sentence_for_pytest_too(
    words: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    done = run_pytest(tmp_path, "--pyargs", "mla.conformance", *words)
    assert done.returncode == 2
    assert sum(line.startswith(sentence) for line in done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stdout + done.stderr


UNDRAWN = """
import mla
import pytest
from mla.conformance import BackendConformance

@pytest.fixture
def backend():
    return mla.load_backend("faulty_backend:FaultyBackend")

class TestMine(BackendConformance):
    pass
"""


def test_without_hypothesis_the_backend_is_not_to_blame(tmp_path: Path) -> None:
    """The class needs it for its drawn checks alone."""
    (tmp_path / "without.py").write_text("import sys\nsys.modules['hypothesis'] = None\n")
    (tmp_path / "test_mine.py").write_text(UNDRAWN)
    sentence = (
        "the suite needs hypothesis to draw cases, and it is not installed: `pip install hypothesis` (it "
    )
    hidden = ("-p", "without", "-p", "no:hypothesispytest")
    done = run_pytest(tmp_path, *hidden, "--pyargs", "mla.conformance", *FAULTY)
    assert done.returncode == 2
    assert sum(line.startswith(sentence) for line in done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stdout + done.stderr
    none = ("--mla-draws", "0", "-k", "rms_norm")  # nothing is drawn, so that nothing is missing
    done = run_pytest(tmp_path, *hidden, "-n0", "--pyargs", "mla.conformance", *FAULTY, *none)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_pytest(tmp_path, *hidden, "-n0", "test_mine.py", "-k", "rms_norm.drawn or rms_norm.formula")
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert sentence in done.stdout
    assert "ModuleNotFoundError" not in done.stdout


COMMAND = ("--backend", "faulty_backend:FaultyBackend", "--quick", "--only", "device.probe")


def test_the_command_is_deaf_to_what_pytest_is_told_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --nonsense\n")
    (tmp_path / "conftest.py").write_text("raise SystemExit('it is of other tests')\n")
    monkeypatch.chdir(tmp_path)
    told = {"PYTEST_ADDOPTS": "--nonsense", "PYTEST_PLUGINS": "no_such_plugin"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", raising=False)
    assert main([*COMMAND]) == 0
    assert {name: os.environ[name] for name in told} == told
    assert "PYTEST_DISABLE_PLUGIN_AUTOLOAD" not in os.environ
    shown = capsys.readouterr()
    assert "1 check: 1 passed" in shown.out
    assert shown.err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conftest.py", "pytest.ini"]


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (None, "pytest 8 or later, and it is not installed: `pip install 'pytest>=8'`"),
        (SimpleNamespace(version_tuple=(7, 4, 4), __version__="7.4.4"), "and version 7.4.4 is installed: "),
    ],
)
def test_without_pytest_it_says_so(
    module: Any, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytest", module)
    assert main([*COMMAND]) == 2
    shown = capsys.readouterr()
    assert (shown.out, len(shown.err.splitlines())) == ("", 1)
    assert sentence in shown.err
    assert main(["--list", "--only", "device.probe"]) == 0, "a list runs nothing"


def test_a_fault_of_the_suite_itself_is_no_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise LookupError("a fault of our own")

    monkeypatch.setattr(Suite, "carry_out", broken)
    assert main([*COMMAND]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "LookupError: a fault of our own" in shown.err


def test_an_infinite_error_is_on_the_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON has no such number, and pytest's reports carry text."""

    def not_a_number(self: Any, *leading: Any, out: torch.Tensor, **rest: Any) -> None:
        out.fill_(torch.nan)

    monkeypatch.setattr(faulty_backend.FaultyOp, "__call__", not_a_number)
    chosen = ("--only", "linear.formula[faulty-*]", "--dtype", "float32", "-O", "op=linear")
    assert main([*COMMAND[:3], *chosen]) == 4
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| linear.formula"))
    assert [cell.strip() for cell in row.split("|")][3:6] == ["FAIL", "4, 4 wrong", "inf"]
