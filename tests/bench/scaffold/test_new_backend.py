"""The project that `new-backend` writes: complete or absent, for every name, and clean under our rules."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla.bench.cli.main import main
from mla.bench.scaffold import new_backend
from mla_backends.known import KNOWN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[3]
LONGEST_NAME = "a23456789_123456789_123456789_12"
FILES = {
    "README.md",
    "mla_backend_acme/__init__.py",
    "mla_backend_acme/ops.py",
    "mla_backend_acme/py.typed",
    "pyproject.toml",
    "tests/conftest.py",
    "tests/test_conformance.py",
    "tests/test_smoke.py",
    "xfails.txt",
}
New = Callable[..., Any]


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> New:
    """Return a function that runs `new-backend` in an own folder; it returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def new(name: str, folder: str = "project") -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["new-backend", name, folder])
        return code, *capsys.readouterr()

    return new


def files(folder: Path) -> set[str]:
    """Return what is in a folder, hidden files included."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_writes_a_project_and_prints_what_to_do_next(new: New, tmp_path: Path) -> None:
    code, out, err = new("acme", "my project")
    assert (code, err) == (0, "")
    assert files(tmp_path / "my project") == FILES
    assert os.listdir(tmp_path) == ["my project"]
    commands = [line.strip() for line in out.splitlines()[2:]]
    assert commands[0] == "cd 'my project'"
    readme = (tmp_path / "my project" / "README.md").read_text()
    assert "\n".join(commands[1:]) == readme.split("```")[1].strip()
    assert len(commands) == 5


def test_an_empty_folder_is_filled_and_stays_the_same_folder(new: New, tmp_path: Path) -> None:
    """A shell may stand in it: `new-backend acme .`"""
    before = tmp_path.stat().st_ino
    assert new("acme", ".")[0] == 0
    assert files(tmp_path) == FILES
    assert tmp_path.stat().st_ino == before


def test_others_may_read_it(new: New, tmp_path: Path) -> None:
    """The folder is made in private and must not stay so."""
    assert new("acme")[0] == 0
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "project").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' is not a valid backend name: use up to 32 lower-case letters, digits and single "),
        ("Acme", "'Acme' is not a valid backend name: "),
        ("acme-npu", "'acme-npu' is not a valid backend name: "),
        ("2nd", "'2nd' is not a valid backend name: "),
        ("_acme", "'_acme' is not a valid backend name: "),
        ("acme_", "'acme_' is not a valid backend name: "),
        ("ac__me", "'ac__me' is not a valid backend name: "),
        ("acmé", "'acmé' is not a valid backend name: "),
        ("acme\n", r"'acme\n' is not a valid backend name: "),
        ("../acme", "'../acme' is not a valid backend name: "),
        (LONGEST_NAME + "3", f"'{LONGEST_NAME}3' is not a valid backend name: "),
        ("torch", "the name 'torch' is taken by torch itself: choose another."),
        ("cpu", "the name 'cpu' is taken by "),
        *((name, f"the name '{name}' is taken by ") for name in KNOWN),
    ],
)
def test_a_name_that_cannot_be_is_refused(new: New, tmp_path: Path, name: str, message: str) -> None:
    code, out, err = new(name)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert not os.listdir(tmp_path)


def test_the_name_of_an_installed_backend_is_refused(
    new: New, install: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`NAME` rules out hyphens, so the fake is offered under another name."""
    point = tmp_path / "owner-1.0.dist-info"
    point.mkdir()
    (point / "METADATA").write_text("Metadata-Version: 2.1\nName: owner\nVersion: 1.0\n")
    (point / "entry_points.txt").write_text("[mla.backends]\nacme = owner\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert new("acme") == (2, "", "error: the name 'acme' is taken by owner 1.0: choose another.\n")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("full", "cannot write 'full': it is not empty."),
        ("file", "cannot write 'file': it is not a folder."),
        ("dangling", "cannot write 'dangling': it is not a folder."),
        ("no/project", "cannot write 'no/project': there is no folder 'no'."),
        ("x" * 300, f"cannot write '{'x' * 300}': File name too long."),
    ],
)
def test_a_folder_that_is_in_use_is_refused(new: New, tmp_path: Path, folder: str, message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").touch()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    assert new("acme", folder) == (2, "", f"error: {message}\n")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "full"]
    assert os.listdir(tmp_path / "full") == [".hidden"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, exists: bool) -> None:
    """A limit on the size of files stops it in the middle of the README."""
    (tmp_path / "work").mkdir()
    if exists:
        (tmp_path / "work" / "project").mkdir()
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
        "from mla.bench.cli.main import main; sys.exit(main(['new-backend', 'acme', 'project']))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path / "work", capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: cannot write 'project': File too large.\n"
    assert list((tmp_path / "work").rglob("*")) == ([tmp_path / "work" / "project"] if exists else [])


# --------------------------------------------------------------------------------------------- contents


def imported(source: str) -> set[str]:
    """Return the names that a module imports."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {alias.asname or alias.name.partition(".")[0] for node in nodes for alias in node.names}


@settings(deadline=None, max_examples=50)
@given(name=st.from_regex(new_backend.NAME, fullmatch=True).filter(lambda name: len(name) <= 32))
def test_every_name_gives_a_project_that_holds_together(name: str) -> None:
    project = new_backend.render(name)
    package = f"mla_backend_{name}"
    facts = tomllib.loads(project["pyproject.toml"])
    assert facts["project"]["entry-points"] == {"mla.backends": {name: package}}
    assert facts["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [package]
    assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", facts["project"]["name"])  # PEP 503's normal form
    for path, text in project.items():
        assert "$" not in text
        if path.endswith(".py"):
            compile(text, path, "exec")
    module = ast.parse(project[f"{package}/__init__.py"])
    (backend,) = (node for node in module.body if isinstance(node, ast.ClassDef))
    if name != "torch":
        assert backend.name not in imported(project[f"{package}/__init__.py"])


def test_it_depends_on_contract_and_runner_as_the_other_plugins_do() -> None:
    facts = tomllib.loads(new_backend.render("acme")["pyproject.toml"])["project"]
    shipped = tomllib.loads((ROOT / "plugins" / "cpu" / "pyproject.toml").read_text())["project"]
    ours = [text for text in shipped["dependencies"] if text.startswith("mla-")]
    assert len(ours) == 2
    assert facts["dependencies"] == ours
    assert facts["requires-python"] == shipped["requires-python"]


def test_the_template_is_part_of_the_package() -> None:
    """Whatever the checkout holds, only what hatchling collects reaches a user."""
    from hatchling.builders.wheel import WheelBuilder

    shipped = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    template = {
        f"mla/bench/scaffold/template/{path.relative_to(new_backend.TEMPLATE)}"
        for path in new_backend.TEMPLATE.rglob("*.template")
    }
    assert len(template) == len(FILES)
    assert template <= shipped


@pytest.mark.parametrize("name", ["acme", LONGEST_NAME])
def test_the_project_is_clean_under_our_rules(new: New, tmp_path: Path, name: str) -> None:
    assert new(name)[0] == 0
    project = str(tmp_path / "project")
    configuration = ("--no-cache", "--config", str(ROOT / "pyproject.toml"))
    ruff = [sys.executable, "-m", "ruff"]
    for words in (("check", *configuration), ("format", "--check", *configuration)):
        done = subprocess.run([*ruff, *words, project], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_project_is_typed_under_our_rules(new: New, tmp_path: Path) -> None:
    assert new("acme")[0] == 0
    project = str(tmp_path / "project")
    words = ["-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "--config-file", "pyproject.toml", project]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": project},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
