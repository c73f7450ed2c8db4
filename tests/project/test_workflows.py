"""The workflows for the public are never run here, so what they call and claim is compared with the tree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import chromium
import pytest

from mla_backends.known import KNOWN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# A path of the tree, as a command or `uses:` names it.
TREE = re.compile(
    r"(?<![\w/.-])(?:\./|\$PWD/)?((?:\.ci|\.github|packaging|tests|backends|plugins|docs)(?:/[\w.-]+)*)"
)

each = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def commands(text: str) -> list[str]:
    """Return what is run or used: the values of `run:`, `uses:` and `tests:`, folded lines included."""
    folded = re.sub(
        r"(run|tests): >-\n((?: {10,}.*\n)+)", lambda m: f"{m[1]}: {' '.join(m[2].split())}\n", text
    )
    return re.findall(r"^[ -]*(?:run|uses|tests): (.+)$", folded, re.MULTILINE)


def listed(text: str, key: str) -> list[str]:
    """Return the values of a YAML list of plain words, on one line or several."""
    match = re.search(rf"^ +{key}:(?: \[(.+)\]|((?:\n +- [\w.-]+)+))", text, re.MULTILINE)
    assert match, key
    return re.findall(r"[\w.-]*\w", match[1] or match[2])


def test_the_scan_sees_what_a_workflow_calls() -> None:
    text = (
        "      - run: .ci/run $TESTS\n      - uses: ./.github/workflows/x.yml # why\n"
        '        run: >-\n          pipx run it --config-file "$PWD/packaging/y.toml"\n          z/tests/w\n'
        "      a: [one, two]\n      b:\n        - three-3\n        - four\n"
    )
    assert [TREE.findall(command) for command in commands(text)] == [
        [".ci/run"], [".github/workflows/x.yml"], ["packaging/y.toml"],
    ]  # fmt: skip
    assert (listed(text, "a"), listed(text, "b")) == (["one", "two"], ["three-3", "four"])


@each
def test_everything_that_a_workflow_names_is_there(path: Path) -> None:
    """And an action is a commit that nobody can move."""
    run = commands(path.read_text("utf-8"))
    named = [name for command in run for name in TREE.findall(command)]
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    for used in run:
        if "@" in used:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used), used


@each
def test_nothing_is_permitted_but_by_a_job(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "\npermissions: {}\n" in text
    writes = set(re.findall(r"([\w-]+): write", text))
    assert writes == {"release.yml": {"id-token"}, "docs.yml": {"pages", "id-token"}}.get(path.name, set())
    assert "secrets." not in text


def test_the_tests_run_on_every_python_and_torch_that_we_claim() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    core, cpu = (
        tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
        for folder in (ROOT, ROOT / "plugins" / "cpu")
    )
    claimed = [re.search(r"Python :: (3\.\d+)$", classifier) for classifier in core["classifiers"]]
    assert listed(text, "python") == [match[1] for match in claimed if match]
    (oldest,) = (
        dependency.removeprefix("torch>=")
        for dependency in cpu["dependencies"]
        if dependency.startswith("torch")
    )
    assert f"requirement: torch=={oldest}.*\n" in text
    assert {"ubuntu-24.04", "ubuntu-24.04-arm"} == set(listed(text, "machine"))


def test_the_oldest_transformers_has_a_job_of_its_own() -> None:
    """Only entries of the matrix are given what belongs to a torch, and this is none: it says all itself."""
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    assert listed(text, "transformers") == ["newest"]
    match = re.search(r"\n( +)- transformers: oldest\n((?:\1  \w+: .+\n)+)", text)
    assert match
    job = dict(line.strip().split(": ", 1) for line in match[2].splitlines())
    assert {"machine", "python", "torch", "requirement", "tests"} == job.keys()
    assert "tests/integrations" in job["tests"].split()
    assert "\n          TRANSFORMERS: ${{ matrix.transformers }}\n" in text


def test_the_gate_looks_for_the_browsers_that_the_tests_know() -> None:
    text = (ROOT / ".ci" / "run").read_text("utf-8")
    match = re.search(r"^for name in (.+); do$", text, re.MULTILINE)
    assert match
    assert tuple(match[1].split()) == chromium.NAMES
    assert "browser=${CHROME:-}\n" in text


def test_a_release_publishes_all_seven_and_what_is_required_first() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text("utf-8")
    order = listed(text, "distribution")
    assert order[:2] == ["mla-backends", "mla-bench"]
    assert set(order[2:]) == {entry.distribution for entry in KNOWN.values()}
    assert len(order) == 7
    assert "max-parallel: 1 " in text
