"""What `packaging/build_all.py` makes: complete, licensed, of one version, and never a vendor's torch."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mla
from mla_backends.known import KNOWN

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "mla-bench": ROOT,
    "mla-backends": ROOT / "backends",
    **{entry.distribution: ROOT / entry.folder for entry in KNOWN.values()},
}
# Written out: whatever else a vendor's machine would have to install is a decision, not an accident.
LIGHT = {"click", "msgspec", "rich", "safetensors", "tomli", "pluggy"}

Script = Callable[..., subprocess.CompletedProcess[str]]


def stem(name: str) -> str:
    return name.replace("-", "_")


def package_of(name: str) -> str:
    """Return the import package of a distribution; only the core's has another name."""
    return "mla" if name == "mla-bench" else stem(name)


def wheel(dist: Path, name: str) -> Path:
    (built,) = dist.glob(f"{stem(name)}-{mla.__version__}-*.whl")
    return built


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(path: Path) -> Message:
    (text_of_metadata,) = (
        text for name, text in contents(path).items() if name.endswith(".dist-info/METADATA")
    )
    return email.message_from_bytes(text_of_metadata)


def on_disk(folder: Path, package: str) -> dict[str, bytes]:
    files = (path for path in (folder / package).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.suffix != ".pyc"}


def requirements(dist: Path, name: str, extra: str = "") -> Iterator[Requirement]:
    """Yield what pip installs for a distribution of ours, through those of ours that it requires."""
    for text in metadata(wheel(dist, name)).get_all("Requires-Dist", []):
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": extra, "python_version": "3.10"}):
            yield wanted
            if canonicalize_name(wanted.name) in FOLDERS:
                yield from requirements(dist, wanted.name, *wanted.extras)


def test_all_seven_are_built_as_sdist_and_wheel(dist: Path) -> None:
    sdists = {f"{stem(name)}-{mla.__version__}.tar.gz" for name in FOLDERS}
    assert {path.name for path in dist.glob("*.tar.gz")} == sdists
    assert {path.name for path in dist.glob("*.whl")} == {wheel(dist, name).name for name in FOLDERS}
    assert len(FOLDERS) == 7


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wheel_from_the_sdist_holds_the_package_as_it_is_in_the_tree(dist: Path, name: str) -> None:
    inside = contents(wheel(dist, name))
    package, facts = package_of(name), f"{stem(name)}-{mla.__version__}.dist-info"
    tree = on_disk(FOLDERS[name], package)
    assert {path: inside.get(path) for path in tree} == tree
    more = {path for path in inside.keys() - tree.keys() if not path.startswith(facts)}
    assert [path for path in more if not path.startswith("mla_backend_cpu/kernels/")] == []  # compiled for it
    assert f"{package}/py.typed" in inside
    assert inside[f"{facts}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert {Path(path).parts[0] for path in inside} == {package, facts}  # no tests


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wheel_from_the_sdist_says_what_one_from_the_tree_says(
    dist: Path, name: str, tmp_path: Path
) -> None:
    """The version is outside the folders of the contract and the plugins, so an sdist has to bring it."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=FOLDERS[name],
        env={**os.environ, "MLA_CPU_KERNELS": "off"},  # they were compiled once for this test
        check=True,
        capture_output=True,
    )
    (direct,) = tmp_path.glob("*.whl")
    assert dict(metadata(wheel(dist, name)).items()) == dict(metadata(direct).items())
    assert metadata(direct)["Version"] == mla.__version__


@pytest.mark.parametrize("name", FOLDERS)
def test_an_sdist_holds_nothing_that_its_wheel_does_not_need(dist: Path, name: str) -> None:
    with tarfile.open(dist / f"{stem(name)}-{mla.__version__}.tar.gz") as archive:
        top = {Path(path).parts[1] for path in archive.getnames()}
        small = sum(member.size for member in archive) < 4e6
    wanted = {package_of(name), "LICENSE", "README.md", "pyproject.toml", "PKG-INFO"}
    assert wanted <= top
    assert top - wanted <= {".gitignore", "hatch_build.py", *(["tests"] if name == "mla-backend-cpu" else [])}
    assert small


@pytest.mark.parametrize("backend", KNOWN)
def test_a_plugin_alone_brings_the_runner_and_torch_only_where_pip_has_the_right_one(
    dist: Path, backend: str
) -> None:
    plugin = KNOWN[backend].distribution
    required = {canonicalize_name(wanted.name) for wanted in requirements(dist, plugin)}
    torch = {"torch", "numpy"} if "PyPI" in KNOWN[backend].torch_source else set()
    assert required == {"mla-bench", "mla-backends"} | LIGHT | torch
    extra = {canonicalize_name(wanted.name) for wanted in requirements(dist, "mla-bench", backend)}
    assert extra == required | {plugin}


def test_the_core_alone_brings_no_plugin_and_no_torch(dist: Path) -> None:
    assert {requirement.name for requirement in requirements(dist, "mla-bench")} == LIGHT | {"mla-backends"}


def test_old_files_are_never_mixed_with_new_ones(packaging_script: Script, tmp_path: Path) -> None:
    (tmp_path / "mla-0.0.1.tar.gz").touch()
    refused = packaging_script("build_all.py", tmp_path)
    assert refused.returncode == 2
    assert "is not empty" in refused.stderr
