"""What the seven pyproject.toml say: one version, one licence, one set of Pythons, and who requires whom."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import mla
from mla.integrations import OLDEST
from mla_backends.known import KNOWN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT, ROOT / "backends", *(path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))))
PROJECTS = {folder: tomllib.loads((folder / "pyproject.toml").read_text("utf-8")) for folder in FOLDERS}
OURS = {project["project"]["name"] for project in PROJECTS.values()}
PYTHON = "Programming Language :: Python :: 3."

each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: PROJECTS[folder]["project"]["name"])


def required(project: dict[str, Any]) -> list[Requirement]:
    extras = project["project"].get("optional-dependencies", {}).values()
    texts = [*project["project"]["dependencies"], *(text for extra in extras for text in extra)]
    return [Requirement(text) for text in texts]


@each
def test_a_distribution_takes_the_others_of_the_same_minor_version(folder: Path) -> None:
    here = Version(mla.__version__)
    bounds = f">={here.major}.{here.minor},<{here.major}.{here.minor + 1}"
    for wanted in required(PROJECTS[folder]):
        if wanted.name in OURS and wanted.name != PROJECTS[folder]["project"]["name"]:  # an extra of its own
            assert wanted.specifier == SpecifierSet(bounds), wanted


@each
def test_every_distribution_says_the_same_of_itself(folder: Path) -> None:
    project, core = PROJECTS[folder]["project"], PROJECTS[ROOT]["project"]
    home = PROJECTS[folder]["tool"]["hatch"]["version"]["path"]
    assert (project["dynamic"], "version" in project) == (["version"], False)
    assert (folder / home).resolve() == ROOT / "mla" / "__init__.py"
    for key in ("license", "license-files", "requires-python"):
        assert project[key] == core[key], key
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    shared = {said for said in core["classifiers"] if not said.startswith("Operating System")}
    assert shared <= set(project["classifiers"])
    assert "Typing :: Typed" in shared
    named = {int(said.removeprefix(PYTHON)) for said in project["classifiers"] if said.startswith(PYTHON)}
    assert project["requires-python"] == f">=3.{min(named)}"


def test_every_plugin_is_a_distribution_and_an_extra_of_the_core() -> None:
    extras = PROJECTS[ROOT]["project"]["optional-dependencies"]
    for folder in FOLDERS[2:]:
        project = PROJECTS[folder]["project"]
        (name,) = project["entry-points"]["mla.backends"]
        assert [Requirement(text).name for text in extras[name]] == [project["name"]]
        assert (folder.name, project["name"]) == (name, KNOWN[name].distribution)
        torch = {"torch", "numpy"} if "PyPI" in KNOWN[name].torch_source else set()  # pip must not replace it
        bare = {Requirement(text).name for text in project["dependencies"]}
        assert bare == {"mla-backends", "mla-bench", *torch}
    assert {folder.name for folder in FOLDERS[2:]} == KNOWN.keys()
    assert {path.parent for path in ROOT.glob("plugins/*/mla_backend_*")} == set(FOLDERS[2:])


def test_the_changelog_has_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## \[{re.escape(mla.__version__)}\] - ", text, re.MULTILINE)


def test_everybody_names_the_same_releases_of_transformers() -> None:
    """Those that pip accepts, the documentation names, CI tries, and error messages ask for."""
    (wanted,) = map(Requirement, PROJECTS[ROOT]["project"]["optional-dependencies"]["transformers"])
    assert [requirement.name for requirement in required(PROJECTS[ROOT])].count("transformers") == 1
    (oldest,) = (specifier.version for specifier in wanted.specifier)
    named = [
        re.findall(r"`transformers`\s\(?([\d.]+) to ([\d.]+)\b", (ROOT / name).read_text("utf-8"))
        for name in ("docs/install.md", "docs/transformers.md")
    ]
    assert [len(pairs) for pairs in named] == [1, 1]
    assert named[0] == named[1]
    assert (named[0][0][0], Version(named[0][0][1]) > Version(oldest)) == (oldest, True)
    assert ".".join(map(str, OLDEST)) == oldest
    for path in (ROOT / "mla").rglob("*.py"):
        asked = re.findall(r"transformers`?\s*(?:>=\s*)?(\d[\d.]*\d)", path.read_text("utf-8"))
        assert set(asked) <= {oldest}, path
