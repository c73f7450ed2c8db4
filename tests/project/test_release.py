"""The scripts of a release: a tag and its changes, links that work on another site."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORGE = "https://forge.example/owner/mla"
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)  # which holds no links
UNNEEDED = [".git", ".venv", ".hypothesis", ".*_cache", "__pycache__"]
UNNEEDED += ["build", "dist", "site", "tests", "*.json"]

Script = Callable[..., subprocess.CompletedProcess[str]]


def snapshot(tree: Path) -> dict[Path, str]:
    """Return what scripts of a release may change."""
    return {
        path: path.read_text("utf-8") for name in ("README.md", "pyproject.toml") for path in tree.rglob(name)
    }


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the repository for scripts that change it."""
    target = tmp_path / "tree"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*UNNEEDED))
    for folder in (ROOT / "tests").rglob("*/"):  # the READMEs link to some
        if folder.is_dir() and folder.name != "__pycache__":
            (target / folder.relative_to(ROOT)).mkdir(parents=True, exist_ok=True)
    return target


def test_a_tag_must_be_the_version_and_its_changes_dated(packaging_script: Script, tree: Path) -> None:
    home, changes = tree / "mla" / "__init__.py", tree / "CHANGELOG.md"
    home.write_text('__version__ = "7.8.9"\n')
    changes.write_text("## [7.8.9] - unreleased\n")
    wrong = packaging_script("check_release.py", "v7.8.8", root=tree)
    assert wrong.returncode == 1
    assert wrong.stderr == (
        "error: the tag is v7.8.8, but mla/__init__.py has version 7.8.9: the tag must be v7.8.9.\n"
        "error: CHANGELOG.md has no line '## [7.8.9] - YYYY-MM-DD': date the release's section.\n"
    )
    changes.write_text("## [7.8.9] - 2031-02-03\n")
    assert packaging_script("check_release.py", "v7.8.9", root=tree).returncode == 0


def test_links_of_the_pages_on_an_index_lead_to_the_forge(packaging_script: Script, tree: Path) -> None:
    done = packaging_script("absolute_links.py", FORGE, "v7.8.9", root=tree)
    assert done.returncode == 0, done.stderr
    pages = [tree / "README.md", tree / "backends" / "README.md", *tree.glob("plugins/*/README.md")]
    assert len(pages) == 7
    for page in pages:
        targets = re.findall(r"\]\(([^)]+)\)", CODE.sub("", page.read_text("utf-8")))
        relative = [target for target in targets if not target.startswith(("https://", "#"))]
        assert targets, page
        assert relative == [], page
        for kind, place in re.findall(rf"\]\({FORGE}/(\w+)/v7\.8\.9/([^)#]+)", page.read_text("utf-8")):
            assert (ROOT / place).is_dir() == (kind == "tree"), place
        project = (page.parent / "pyproject.toml").read_text("utf-8")
        assert f'[project.urls]\nSource = "{FORGE}"\n' in project


LINKS = """
[![a](../docs/one.svg)](../docs/README.md#b)
<source srcset="../docs/one.svg"> <img alt='a' src='../docs/one.svg'><a href="../docs">c</a>
[d](#e) [f](https://g.example/h) [i](mailto:j@k.example) [l](<../docs/README.md> "a (title)") [m](../docs 'n')
[o] `[p](nowhere.md)` ``[q](`nowhere.md`)``

[o]: ../docs/README.md#b "r"

~~~~
[s](nowhere.md)
~~~
[t]: nowhere.md
~~~~
[u](../docs)
```python
table[name](argument)
```
[v](../docs)
"""


def test_links_of_every_form_are_found_and_code_is_none(packaging_script: Script, tree: Path) -> None:
    (tree / "docs" / "one.svg").write_text("<svg/>")
    page = tree / "backends" / "README.md"
    page.write_text(LINKS)
    done = packaging_script("absolute_links.py", FORGE, "v1", root=tree)
    assert done.returncode == 0, done.stderr
    expected = LINKS.replace("../docs/one.svg", f"{FORGE}/raw/v1/docs/one.svg")
    expected = expected.replace("../docs/README.md", f"{FORGE}/blob/v1/docs/README.md")
    expected = re.sub(r"\.\./docs(?=[\s\")])", f"{FORGE}/tree/v1/docs", expected)
    assert page.read_text() == expected
    before = snapshot(tree)
    again = packaging_script("absolute_links.py", FORGE, "v2", root=tree)
    assert again.returncode == 1
    assert "pyproject.toml has [project.urls]: this runs once" in again.stderr
    assert snapshot(tree) == before


@pytest.mark.parametrize(
    ("link", "sentence"),
    [
        ("[a](../nowhere.md#b)", "links to ../nowhere.md: it does not exist."),
        ("[a](../../..)", "links to ../../..: it is outside of the repository."),
        ("[a][b]\n\n[b]: nowhere.md", "links to nowhere.md: it does not exist."),
    ],
)
def test_a_dead_link_ends_a_release_and_changes_nothing(
    packaging_script: Script, tree: Path, link: str, sentence: str
) -> None:
    page = tree / "backends" / "README.md"
    page.write_text(link)
    before = snapshot(tree)
    done = packaging_script("absolute_links.py", FORGE, "v7.8.9", root=tree)
    assert done.returncode == 1
    assert done.stderr == f"error: {page} {sentence}\n"
    assert snapshot(tree) == before


@pytest.mark.parametrize(
    ("script", "words", "code", "sentence"),
    [
        ("build_all.py", ["FILE"], 2, "FILE cannot be made a folder: File exists."),
        ("build_all.py", ["FILE/dist"], 2, "FILE/dist cannot be made a folder: Not a directory."),
        ("build_all.py", ["dist", "--jobs", "0"], 2, "argument --jobs: '0' is not a number from 1 to 99"),
        ("smoke.py", ["nowhere"], 1, "nowhere must have one wheel of mla_bench "),
    ],
)
def test_a_mistake_is_a_sentence(
    packaging_script: Script, tmp_path: Path, script: str, words: list[str], code: int, sentence: str
) -> None:
    (tmp_path / "FILE").touch()
    paths = [str(tmp_path / word) if word.startswith(("FILE", "dist", "nowhere")) else word for word in words]
    done = packaging_script(script, *paths)
    assert (done.returncode, done.stdout) == (code, "")
    assert sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
